"""The entry point of one rank: a process that the agent forks from its fork server.

This module is what the fork server preloads, so importing it imports all that a rank needs, initialises nothing and
starts no thread.
"""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint.huggingface.answering import HuggingFaceModel

with warnings.catch_warnings():  # megatron-core says at length which optional packages it does without
    warnings.simplefilter("ignore")
    import orjson
    import torch
    import torch.distributed as dist

    from trainer import device as devices
    from trainer import loop, parallel
    from trainer.checkpoint.service.room import Room
    from trainer.config import RunConfig
    from trainer.config_file import from_tree, parse_yaml
    from trainer.data.batches import TrainingData
    from trainer.data.prepared import PreparedFolder
    from trainer.data.windows import HeldoutReader
    from trainer.evaluate.heldout import HeldoutEvaluation
    from trainer.events import EventLog
    from trainer.heartbeat import Heartbeat, answer_with_stacks, beat_path, stack_path
    from trainer.inference.answering import answer
    from trainer.inference.cached import CachedModel
    from trainer.inference.frozen import FrozenModel
    from trainer.inference.layout import inference_config
    from trainer.inference.requests import read_requests, write_answers
    from trainer.progress import Advance, ProgressFile, unheard
    from trainer.rank_spec import RankSpec
    from trainer.run_dir import RunDir
    from trainer.stop import StopRequest


def main(spec: RankSpec) -> None:
    """Run the task of this rank to its end; an exception means that the rank failed."""
    heartbeat = _heartbeat(spec)
    os.environ.update(  # what DeepSpeed reads
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_RANK=str(spec.local_rank),
        LOCAL_WORLD_SIZE=str(spec.local_world_size),
    )
    torch.set_num_threads(spec.threads)
    warnings.simplefilter("ignore", FutureWarning)
    config = from_tree(parse_yaml(spec.config_yaml))
    if spec.task == "answer":
        config = inference_config(config)  # of as many ranks
    kind = devices.resolve(config.launch.device)
    device = devices.activate(kind, spec.local_rank)
    heartbeat.measure = partial(devices.memory, device)
    run_dir = RunDir(spec.run_dir)
    stop = StopRequest(run_dir.stop_path if spec.rank == 0 else None)
    if spec.task == "train":
        stop.listen()
    parallel.initialize(config.parallel, kind, spec.rendezvous, spec.rank, spec.world_size)
    if spec.task == "train":
        _train(spec, config, run_dir, device, stop, heartbeat)
    elif spec.task == "evaluate":
        heartbeat.phase("evaluating")
        _evaluate(spec, config, run_dir, device, heartbeat)
    elif spec.task == "answer":
        heartbeat.phase("evaluating")
        _answer(spec, config, device, heartbeat)
    else:
        heartbeat.phase("evaluating")
        _logits(spec, config, run_dir, device)
    heartbeat.phase("ending")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def _heartbeat(spec: RankSpec) -> Heartbeat:
    """This rank's, and with it all that others may want to know of the rank from outside."""
    if spec.heartbeats is None:
        return Heartbeat()
    answer_with_stacks(stack_path(spec.heartbeats, spec.rank))  # before anybody learns whom to ask
    heartbeat = Heartbeat(beat_path(spec.heartbeats, spec.rank))
    if heartbeat.is_kept:
        parallel.tell_waits(heartbeat.waited)
    return heartbeat


def _train(
    spec: RankSpec,
    config: RunConfig,
    run_dir: RunDir,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
) -> None:
    first_here = spec.rank - spec.local_rank
    is_replicated = config.checkpoint.replicates(config.launch.nodes)
    room = (
        Room(spec.room, range(first_here, first_here + spec.local_world_size), is_replicated=is_replicated)
        if spec.room
        else None
    )
    log = EventLog(run_dir.events_path) if spec.rank == 0 else None
    try:
        loop.train(config, run_dir, device, log.write if log is not None else _write_nothing, room, stop, heartbeat)
    finally:
        if log is not None:
            log.close()


def _evaluate(spec: RankSpec, config: RunConfig, run_dir: RunDir, device: torch.device, heartbeat: Heartbeat) -> None:
    """Held-out loss of a checkpoint, as JSON in `spec.output`."""
    assert spec.checkpoint is not None and spec.output is not None
    model = _exported(spec, config) or FrozenModel(config, spec.checkpoint, device)
    data = PreparedFolder.open(run_dir.data_for(config))
    heldout = HeldoutReader(data, config.model.seq_length)
    evaluation = HeldoutEvaluation(TrainingData.open(data, config), heldout, config, device)
    result = evaluation.run(partial(model.evaluate, advance=_advance(spec.output, heartbeat)))
    if dist.get_rank() == 0:
        spec.output.write_bytes(orjson.dumps(result))


def _answer(spec: RankSpec, config: RunConfig, device: torch.device, heartbeat: Heartbeat) -> None:
    """Answers to the requests of a file in `spec.output`, whatever layout trains: that for inference follows."""
    assert spec.checkpoint is not None and spec.output is not None and spec.requests is not None
    requests, advance = read_requests(spec.requests), _advance(spec.output, heartbeat)
    if (exported := _exported(spec, config)) is not None:
        write_answers(spec.output, exported.answer(requests, advance))
        return
    model = CachedModel(config, spec.checkpoint, device)
    if dist.get_rank() > 0 or spec.stream is None:
        answers = answer(model, requests, None, advance)
    else:
        with open(spec.stream, "a", encoding="ascii", buffering=1) as stream:
            answers = answer(model, requests, lambda number, token: print(number, token, file=stream), advance)
    if dist.get_rank() == 0:
        write_answers(spec.output, answers)


def _exported(spec: RankSpec, config: RunConfig) -> "HuggingFaceModel | None":
    """A folder of Hugging Face in the place of a checkpoint, by transformers alone; on one rank."""
    assert spec.checkpoint is not None
    if not (spec.checkpoint / "config.json").is_file():
        return None
    from trainer.checkpoint.huggingface.answering import HuggingFaceModel  # seconds to import, which few ranks need

    assert spec.world_size == 1
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return HuggingFaceModel(spec.checkpoint, dtype, devices.resolve(config.launch.device))


def _advance(output: Path, heartbeat: Heartbeat) -> Advance:
    """Tells who waits for the output how far this rank is, and who watches it that it is alive."""
    told = ProgressFile(output).write if _is_first_replica() else unheard

    def advance(done: int, total: int) -> None:
        heartbeat.phase("evaluating")
        told(done, total)

    return advance


def _logits(spec: RankSpec, config: RunConfig, run_dir: RunDir, device: torch.device) -> None:
    """fp32 logits of the first held-out sequences, with the tokens, as a torch file in `spec.output`.

    Where there is no data, as for a model that was imported, of random tokens.
    """
    assert spec.checkpoint is not None and spec.output is not None
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    model = FrozenModel(config, spec.checkpoint, device)
    folder = run_dir.data_for(config)
    if folder.exists():
        heldout = HeldoutReader(PreparedFolder.open(folder), config.model.seq_length)
        text, tokens = "of held-out text", heldout.windows(range(min(2, heldout.num_windows)))[:, :-1].to(device)
    else:
        draw = torch.Generator().manual_seed(config.seed)
        tokens = torch.randint(config.model.vocab_size, (2, config.model.seq_length), generator=draw).to(device)
        text = "drawn at random"
    logits = model.logits(tokens)
    if logits is not None and _is_first_replica():
        torch.save({"tokens": tokens.cpu(), "logits": logits.cpu(), "text": text}, spec.output)


def _is_first_replica() -> bool:
    """Whether this rank is one of the pipeline that speaks where all would say the same."""
    return not (parallel.tensor_rank() or parallel.context_rank() or parallel.data_rank())


def _write_nothing(*_: Any, **__: Any) -> None:
    """Only rank 0 writes events."""
