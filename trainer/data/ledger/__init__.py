"""Proof that a run used each sample of its data exactly once an epoch, whatever crashed or was rolled back.

| room       | what                                                                             |
|------------|----------------------------------------------------------------------------------|
| `history`  | events -> the steps in the history of the final weights, and what was void       |
| `order`    | whether those steps follow each other without hole, and as scheduled             |
| `coverage` | which windows an epoch has drawn, marked one by one                              |
| `tokens`   | the digest of each step's samples, from the prepared data                        |
| `anchors`  | what the checkpoints state, beside what the steps add up to                      |
| `audit`    | all of it together                                                               |
| `report`   | the `Ledger` that it makes, whose findings are what does not hold                |

What is trusted: that a step which records a digest was fed the tokens of that digest (`ReadAhead` takes it of the very
batch), and xxh3-64. Neither the schedule nor the shuffled order is: a step's samples are those that it records, and
windows are counted.
"""
