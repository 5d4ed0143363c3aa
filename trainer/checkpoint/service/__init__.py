"""The checkpoint service of a machine. It imports no torch, and remembers nothing that is not in files.

| module     | what                                                                                          |
|------------|-----------------------------------------------------------------------------------------------|
| `room`     | the shared memory in which ranks leave snapshots, and all that both sides tell each other       |
| `presence` | whether a service lives                                                                        |
| `saving`   | snapshots become checkpoints on disk                                                           |
| `uploads`  | checkpoints on their way to an object store                                                    |
| `replica`  | snapshots in the memory of other machines                                                      |

`launcher.node.checkpoint_process` runs it.
"""
