"""Never lose a step, never trust a file, load anywhere.

| room           | what                                                                                             |
|----------------|--------------------------------------------------------------------------------------------------|
| `format`       | what a checkpoint is: files of blocks, a manifest, a folder that exists whole or not at all        |
| `sharded`      | a rank's share of the training state, written to a file of its own and read back in any layout     |
| `interval`     | when to save: after steps, after a time, or at Daly's optimum                                      |
| `saver`        | a rank's side of saving: a snapshot in shared memory, or, by `waiting_save`, a wait for the disk   |
| `service`      | the other side, a process on every machine: snapshots become checkpoints, and copies of them       |
| `remote`       | checkpoints on object stores                                                                     |
| `huggingface`  | exports and imports                                                                              |
"""
