"""The layout in which a checkpoint answers, from any in which it can be trained."""

import pytest

from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.inference.layout import inference_config, is_for_inference
from trainer.rules import changed
from trainer.support import FEATURES, combined, pairs

SMALL = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "vocab_size": 256, "seq_length": 64},
    "train": {"global_batch_size": 16},
}


def check(config: RunConfig) -> None:
    found = inference_config(config)
    before, after = config.parallel, found.parallel
    assert is_for_inference(found)
    assert (after.tensor, after.pipeline, after.num_ranks) == (before.tensor, before.pipeline, before.num_ranks)
    assert (after.context, after.virtual_pipeline, after.sequence, after.zero) == (1, 1, False, 1)
    assert found.model == config.model and found.train.precision == config.train.precision
    assert inference_config(found) == found


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_has_one(name: str) -> None:
    check(from_tree(changed(from_tree(SMALL), FEATURES[name].settings).model_dump(mode="json")))


def test_any_two_features_have_one() -> None:
    for one, other in pairs():
        check(from_tree(changed(from_tree(SMALL), combined(one, other)).model_dump(mode="json")))


def test_places_of_ranks_and_a_growing_batch_are_no_obstacle() -> None:
    train = {"global_batch_size": 96, "micro_batch_size": 4, "ramp_start_batch_size": 24, "ramp_tokens": 10**6}
    parallel = {"tensor": 2, "context": 2, "data": 3, "sequence": True}
    launch = {"nodes": 3, "ranks_per_node": 4}
    config = from_tree(SMALL | {"train": train, "parallel": parallel, "launch": launch})
    check(config)
    assert inference_config(config, replicas=3).parallel.num_ranks == 6


def test_one_replica_is_enough_for_one_request() -> None:
    parallel = {"tensor": 2, "pipeline": 2, "data": 2, "context": 2}
    found = inference_config(from_tree(SMALL | {"parallel": parallel, "launch": {"ranks_per_node": 16}}), replicas=1)
    assert (found.parallel.data, found.parallel.num_ranks, found.ranks_per_node) == (1, 4, 4)
