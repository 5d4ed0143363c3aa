"""From a prepared folder to micro-batches: what lies in it, which window the n-th sample is, and reading it in time.

| room          | what                                                                        |
|---------------|-----------------------------------------------------------------------------|
| `prepared`    | the folder: its data sets, its blend, its fingerprints                       |
| `blend`       | which data set the n-th sample comes from; how often each is read in a run   |
| `permutation` | a shuffled order that is computed, never stored                              |
| `shards`      | `.bin` and `.idx` as an array of token ids                                   |
| `windows`     | sequences of token ids out of shards                                         |
| `digest`      | a number for what a step was fed, the same however replicas split it         |
| `batches`     | samples by position, held-out sequences, reading ahead                       |
| `ledger`      | proof, from a run's events, that each sample was used once an epoch          |

The first four are free of torch, so that the launcher can look at data before a rank starts.
"""
