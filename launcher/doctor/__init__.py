"""What a run needs of machines and their cluster, seen before it starts: one finding a check, each with its fix.

Every file of `checks` measures one thing (`measure`, which touches the machine) and judges it (`judge`, a pure function
of what was measured and the config, which holds the thresholds). `machine` puts together what is looked at on every
machine, `examination` where: here, or on all machines of a Ray cluster (`cluster`).
"""
