"""On how many machines a run can live, and with which layout on each number; and its evaluation service."""

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


def service_config(config: RunConfig) -> RunConfig:
    """A run's config, laid out as `evaluation` says, on machines of its own.

    Raises:
        UserError: the model cannot be laid out so.
    """
    wanted, layout = config.evaluation, config.parallel
    settings = {
        "parallel.tensor": wanted.tensor or layout.tensor,
        "parallel.pipeline": wanted.pipeline or layout.pipeline,
        "parallel.virtual_pipeline": 1,
        "parallel.context": 1,
        "parallel.data": wanted.data,
        "parallel.sequence": False,
        "parallel.zero": 1,
        "parallel.offload": "none",
        "train.global_batch_size": config.train.micro_batch_size * wanted.data,
        "train.ramp_start_batch_size": None,
        "train.ramp_tokens": 0,
        "train.recompute": "none",
        "launch.nodes": wanted.nodes,
        "launch.ranks_per_node": None,
        "launch.spares": 0,
        "checkpoint.replicate": False,
    }
    tree = config.model_dump(mode="json") | {"preset": None}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return config_file.from_tree(tree)
    except UserError as error:
        raise UserError(
            f"the evaluation service cannot hold the model: {error} (its settings are evaluation.tensor, pipeline, "
            "data and nodes)"
        ) from error
