"""Checkpoints are found as they are to be read: by themselves."""

from dataclasses import replace
from pathlib import Path

from launcher.verbs import importing
from launcher.verbs.inspection import find_to_export
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, fingerprint
from trainer.config_file import from_tree


def test_a_checkpoint_is_read_where_there_is_no_room_for_the_evaluation_service_of_its_run(tmp_path: Path) -> None:
    """Here on one machine, where the run had three."""
    service = {"where": "service", "nodes": 2, "data": 2}
    config = from_tree({"data": {"sources": ["text.jsonl"]}, "evaluation": service})
    temporary = store.begin(tmp_path, 0)
    (temporary / "weights").write_bytes(b"weights")
    manifest = Manifest(0, 0, config.model_dump(mode="json"), files={"weights": fingerprint(temporary / "weights")})
    checkpoint = store.commit(temporary, replace(manifest, kinds=["master"]))
    (tmp_path / importing.TOKENIZER_FOLDER).mkdir()
    found, _ = find_to_export(tmp_path, None, ())
    assert found.checkpoint == checkpoint and not found.config.evaluation.has_service
