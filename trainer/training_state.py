"""What a run keeps of every weight, by the names under which checkpoints store it. All of it is fp32."""

MASTER = "master"
"""The weight itself; what forward uses is derived from it."""
FIRST_MOMENT = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
STATE_KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)
