"""What a checkpoint is, and what can be asked of it without a model, an engine or a process group.

| module           | what                                                                                |
|------------------|-------------------------------------------------------------------------------------|
| `chunk_file`     | a rank's file: blocks of global tensors, which describe themselves                   |
| `chunk_reader`   | reading parts of them, planned by torch.distributed.checkpoint                       |
| `global_tensors` | whole tensors, one at a time                                                         |
| `manifest`       | what a checkpoint holds, with the size and hash of every file                        |
| `store`          | folders: how one comes to exist, is found, checked and removed                       |
| `disk`           | files brought to the disk, and read back from it                                     |
| `retention`      | which checkpoints stay                                                               |
| `results`        | what evaluations have found of one                                                   |
| `compatibility`  | whether one fits a run                                                               |
| `comparison`     | in what two differ                                                                   |
"""
