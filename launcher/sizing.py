"""On how many machines a run can live, and with which layout on each number."""

from trainer import config_file
from trainer.config import RunConfig, UserError


def sizes(config: RunConfig) -> dict[int, RunConfig]:
    """Number of machines -> the config of a life on so many, the full number first.

    Only the data-parallel size changes: the model is cut as it was, the batch is the same, and so is what is computed,
    beyond rounding. Numbers with which the layout or the batch does not come out even are not there.
    """
    model_ranks = config.parallel.num_ranks // config.parallel.data
    found = {config.launch.nodes: config}
    for nodes in range(config.launch.nodes - 1, (config.supervise.min_nodes or 1) - 1, -1):
        data, rest = divmod(nodes * config.ranks_per_node, model_ranks)
        if data == 0 or rest:
            continue
        try:
            found[nodes] = config_file.override(
                config.model_dump(mode="json") | {"preset": None},
                [
                    f"launch.nodes={nodes}",
                    f"launch.ranks_per_node={config.ranks_per_node}",
                    f"parallel.data={data}",
                ],
            )
        except UserError:  # the batch is not divisible
            continue
    return found
