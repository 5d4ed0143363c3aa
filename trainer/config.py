"""The configuration of a run: one typed tree, read from YAML plus `a.b=value` overrides, validated in one place.

Everything else (the megatron-core config, the DeepSpeed JSON, the number of ranks) is derived from it. Nothing here
imports torch, so reading and checking a config takes milliseconds.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from trainer.data_config import DataConfig
from trainer.rules import broken
from trainer.section import Section, Strings, Tokens
from trainer.section import UserError as UserError
from trainer.support import RULES
from trainer.urls import holds_secrets, without_secrets

NORM_EPS = 1e-5  # of every layer norm, in the released models of all three papers
VOCAB_MULTIPLE = 128  # the padded vocabulary is a multiple of this, whatever the layout, so that layouts agree


class ModelConfig(Section):
    num_layers: int = Field(12, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(768, ge=1)
    """Width of the residual stream (elements)."""
    num_heads: int = Field(12, ge=1)
    """Attention heads per layer; must divide hidden_size."""
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Width of the feed-forward layer (elements); empty means 4 x hidden_size."""
    vocab_size: int = Field(50257, ge=1)
    """Tokens in the vocabulary, the end-of-text token included; a tokenizer that the run trains has exactly so many."""
    seq_length: int = Field(2048, ge=2)
    """Tokens in one training sequence, and the longest context the model can read."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads per layer, each shared by a group of attention heads; empty gives every head its own."""
    attention_window: int | None = Field(None, ge=1)
    """Tokens that a position of every second layer sees, itself included (GPT-3's banded layers); empty: all dense."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector per position (GPT-1 to GPT-3) or rotations of queries and keys."""
    rotary_base: float = Field(10_000.0, gt=1.0)
    """Base of the rotary wavelengths; longer contexts use larger ones."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm, which has neither mean nor bias."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Norm before each sub-block (GPT-2, GPT-3) or after its residual addition (GPT-1)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layer: GELU between two matrices, or SiLU gating (two matrices in, one out)."""
    biases: Literal["all", "all_but_qkv", "none"] = "all"
    """Which linear layers have a bias; all_but_qkv leaves out queries, keys and values (GPT-Neo)."""
    tied_embeddings: bool = True
    """Share one matrix between the token embedding and the output layer."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping an element of an embedding, a residual branch or an attention weight."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights; residual projections get this over sqrt(2 x num_layers)."""

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up, independent of the layout."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class TrainConfig(Section):
    total_tokens: Tokens = 10**9
    """Tokens to train on over the whole run; rounded up to whole steps."""
    global_batch_size: int = Field(256, ge=1)
    """Sequences per optimizer step over all ranks."""
    ramp_start_batch_size: int | None = Field(None, ge=1)
    """Sequences in the first steps, and by how many the batch grows to global_batch_size; empty means no ramp."""
    ramp_tokens: Tokens = 0
    """Tokens over which the batch grows linearly (GPT-3, appendix B)."""
    micro_batch_size: int = Field(1, ge=1)
    """Sequences per forward and backward pass of one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights and optimizer state are fp32 in both."""
    transformer_engine: bool = False
    """On CUDA, TransformerEngine's norms and linear layers in place of PyTorch's; the package must be installed."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: keep everything, all but the inside of attention, or only each layer's input."""


class OptimizerConfig(Section):
    lr: float = Field(6.0e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    min_lr_fraction: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end of the decay, as a fraction of the peak."""
    warmup_tokens: Tokens = 0
    """Tokens over which the learning rate rises linearly from zero."""
    decay_tokens: Tokens | None = None
    """Tokens, warm-up included, after which the cosine has reached its end; empty means train.total_tokens."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment per step."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay rate of the second moment per step."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled decay of matrices per unit of learning rate; norms and biases are never decayed."""
    clip_grad_norm: float = Field(1.0, ge=0.0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 turns clipping off."""


class StabilityConfig(Section):
    spike_zscore: float = Field(8.0, ge=0.0)
    """A loss or gradient norm so many robust standard deviations above the window's median is a spike; 0: none is."""
    window: int = Field(64, ge=2)
    """Accepted steps that a spike is measured against; there is none before half of them."""
    max_skips_in_a_row: int = Field(3, ge=1)
    """Skipped steps in a row after which training goes back to the newest checkpoint and passes them over."""
    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks, without a sound checkpoint beyond the trouble, after which the run ends as diverged."""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that split every matrix."""
    pipeline: int = Field(1, ge=1)
    """Ranks that split the layers into consecutive stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Chunks of layers per pipeline rank; above 1 the schedule is the interleaved one."""
    context: int = Field(1, ge=1)
    """Ranks that split every sequence; attention trades its heads for whole sequences (Ulysses)."""
    data: int = Field(1, ge=1)
    """Replicas that split the batch."""
    sequence: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what data-parallel ranks split (1 optimizer state, 2 and gradients, 3 and weights)."""
    offload: Literal["none", "optimizer"] = "none"
    """What is kept in the host's memory: nothing, or the optimizer with its state and the fp32 master weights."""

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def describe(self) -> str:
        interleaved = f" ({self.virtual_pipeline} chunks)" if self.virtual_pipeline > 1 else ""
        sequence = " with sequence parallel" if self.sequence else ""
        pipeline = f"pipeline {self.pipeline}{interleaved}"
        offload = " with the optimizer offloaded" if self.offload == "optimizer" else ""
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"tensor {self.tensor}{sequence} x {pipeline}{context} x data {self.data}, ZeRO-{self.zero}{offload}"


Tasks = Annotated[
    tuple[str, ...],
    Field(strict=False),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(list),
]


class EvaluationConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Steps between evaluations of the held-out loss; 0 evaluates only before and after training."""
    max_sequences: int | None = Field(None, ge=1)
    """Held-out sequences to evaluate on; empty means all of them."""
    tasks: Tasks = ()
    """Tasks by which every committed checkpoint is judged: names of those that come along, YAML files, or folders of
    them."""
    max_examples: int | None = Field(None, ge=1)
    """Examples of each task at most, drawn by the run's seed; empty means all of them."""
    contamination: bool = False
    """Tell apart which examples stand in the training text too, which is read for it once."""
    where: Literal["ranks", "service"] = "ranks"
    """Who judges: the training ranks, between steps, or ranks of their own beside training, which measure the held-out
    loss of every checkpoint too."""
    when_behind: Literal["skip", "queue"] = "skip"
    """What the service does where checkpoints come faster than it judges: go on with the newest, or judge every one,
    none of which is removed before."""
    tensor: int | None = Field(None, ge=1)
    """Ranks of the service that split every matrix; empty: as in training."""
    pipeline: int | None = Field(None, ge=1)
    """Ranks of the service that split the layers; empty: as in training."""
    data: int = Field(1, ge=1)
    """Replicas of the model in the service, which share the work."""
    nodes: int = Field(1, ge=1)
    """Machines of the service, beside those of training."""

    @property
    def has_service(self) -> bool:
        return self.where == "service"


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; empty: 1000, or none where every_seconds is set. The last step is always saved."""
    every_seconds: Annotated[float, Field(gt=0.0)] | Literal["auto"] | None = None
    """Time between checkpoints (s); auto: Daly's optimum for the measured cost of saving and the failures seen."""
    snapshot_every_steps: int | None = Field(None, ge=1)
    """Steps between snapshots that stay in the machine's memory, for restarts; empty: none but of checkpoints."""
    replicate: bool = False
    """Keep a copy of every snapshot in the memory of the next machine too, for when a machine is lost; takes twice as
    much memory."""
    asynchronous: bool = True
    """Copy the state to shared memory and go on while a service writes it; otherwise training waits for the disk."""
    snapshots_in: str = Field("/dev/shm", min_length=1)
    """Folder of memory, or of a fast disk, on every machine, with room for the state of its ranks three times."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a save does that is due while the one before is still being written."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints to keep; older ones are removed after a newer one is committed."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints of steps that this divides are kept for ever."""
    keep_best: int = Field(0, ge=0)
    """Best checkpoints to keep, among those that were evaluated."""
    best_by: str | None = Field(None, min_length=1)
    """The score by which they are the best, as results name it, such as `larger_number/8-shot/accuracy`; empty: the
    held-out loss."""
    upload_to: str | None = None
    """Folder or URL (s3://, gs://, ...) of this run alone, to which committed checkpoints are copied, and from which it
    goes on where its own are lost."""
    verify: bool = True
    """Check the hash of every file before it is loaded."""
    grace_seconds: float = Field(60.0, gt=0.0)
    """Time to save and end after SIGTERM or a preemption notice (s)."""
    resume_from: str | None = None
    """A checkpoint of another run, written in any layout, to start from when this run has none of its own."""
    weights_from: str | None = None
    """A checkpoint, imported or of another run, whose weights to start from, with a new optimizer and at step 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resume_from and self.weights_from:
            raise ValueError(
                "checkpoint.resume_from and checkpoint.weights_from are both set, and a run starts from one; "
                "resume_from goes on with optimizer and step, weights_from begins anew"
            )
        if self.snapshot_every_steps and not self.asynchronous:
            raise ValueError(
                "checkpoint.snapshot_every_steps needs checkpoint.asynchronous, which is false; snapshots lie in the "
                "memory that it uses"
            )
        if self.upload_to and holds_secrets(self.upload_to):
            raise ValueError(
                f"checkpoint.upload_to holds credentials or a query, {without_secrets(self.upload_to)}, and is copied "
                "to every checkpoint; give the driver its own variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING, ...)"
            )
        return self

    @property
    def needs_service(self) -> bool:
        """Whether machines run a checkpoint service."""
        return self.asynchronous or self.upload_to is not None

    def replicates(self, num_nodes: int) -> bool:
        """Whether snapshots are copied to other machines."""
        return self.replicate and num_nodes > 1

    @property
    def interval_steps(self) -> int | None:
        """Steps between checkpoints, where they are counted in steps."""
        return self.every_steps or (None if self.every_seconds else 1000)


class GenerateConfig(Section):
    prompt: str = Field("The ", min_length=1)
    """Text to continue with the exported model at the end of a run."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate."""


class LaunchConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where it exists."""
    nodes: int = Field(1, ge=1)
    """Machines, one agent each."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Ranks on each machine; empty spreads the layout's ranks evenly."""
    threads_per_rank: int | None = Field(None, ge=1, le=4096)
    """CPU threads per rank; empty shares the machine's cores evenly."""
    spares: int = Field(0, ge=0)
    """Machines beyond nodes whose warm agents wait to take a lost one's place."""
    cluster: str | dict[str, Any] | None = None
    """What machines these are, for plans: `a100-80`, `h100`, `h200`, `b200`, `cpu`, the path of a YAML file of your
    own, or what would stand in it; may change while a run goes on. See docs/planning.md."""
    labels: dict[str, str] = Field({})
    """Ray's labels that every machine must have, such as `ray.io/accelerator-type: H100`."""
    topology: Strings = ("ray.io/region", "ray.io/availability-zone")
    """Ray's labels that tell which machines are near each other, from wide to narrow; below them addresses do."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field({})
    """Environment variables of agents and ranks, such as `NCCL_DEBUG: INFO`. No secrets: they stand in the run's
    folder and in its checkpoints."""


class SuperviseConfig(Section):
    max_failures: int = Field(10, ge=0)
    """Failures in a row, without a newer checkpoint to go on from, that are answered by a restart; 0 restarts never."""
    max_preemptions: int = Field(100, ge=0)
    """Lost or leaving machines in a row, without a newer checkpoint to go on from, that are answered by a restart."""
    max_same_failures: int = Field(3, ge=1)
    """Times in a row that the same error at the same step ends the run: another restart would only meet it again."""
    delay_seconds: float = Field(1.0, ge=0.0)
    """Before the second restart in a row without progress (s), twice as long before each one after it; the first comes
    at once."""
    longest_delay_seconds: float = Field(60.0, ge=0.0)
    """Before any restart (s)."""
    max_node_failures: int = Field(3, ge=1)
    """Failures of one machine after which it is left out, as long as the others hold a layout."""
    patience_seconds: float = Field(300.0, ge=0.0)
    """To wait for a lost machine, or another in its place (s), before going on with fewer data-parallel replicas."""
    min_nodes: int | None = Field(None, ge=1)
    """Fewest machines to go on with after patience; empty: as few as hold one replica of the model."""
    grow_seconds: float = Field(60.0, ge=0.0)
    """For which machines must be back before a run that has shrunk grows again (s); longer after it did in vain."""
    hang_factor: float = Field(20.0, gt=1.0)
    """Multiple of the median step time without a sign of life after which ranks are taken to hang."""
    hang_seconds: float = Field(600.0, gt=0.0)
    """Least time without a sign of life after which ranks are taken to hang (s); six times that outside of steps."""
    straggler_factor: float = Field(1.3, gt=1.0)
    """How many times as long as it would a step takes because of one rank, if that rank is to be named as slow."""
    straggler_seconds: float = Field(60.0, gt=0.0)
    """Between looks for slow ranks (s), of which three in a row must find the same one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delay_seconds > self.longest_delay_seconds:
            raise ValueError(
                f"supervise.delay_seconds {self.delay_seconds:g} is longer than supervise.longest_delay_seconds "
                f"{self.longest_delay_seconds:g}; raise the latter"
            )
        return self


SinkNames = Annotated[
    tuple[Literal["tensorboard", "wandb"], ...],
    Field(strict=False),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(list),
]


class MonitoringConfig(Section):
    listen: Literal["loopback", "network", "nowhere"] = "loopback"
    """Who may reach the page and the metrics of a run: this machine, others too (the page then asks for a token), or
    nobody."""
    page_port: int = Field(0, ge=0, lt=2**16)
    """Port of the page and of the run's metrics, where the command runs; 0: any that is free."""
    node_port: int = Field(0, ge=0, lt=2**16)
    """Port of each machine's metrics; 0: any that is free, which is also taken where this one is not."""
    ranks_every_seconds: float = Field(10.0, gt=0.0)
    """Between two records of how long each rank works in a step (s)."""
    sinks: SinkNames = ()
    """Where curves are told to as well, by packages that are installed as extras: TensorBoard's files in the run's
    folder, Weights & Biases (offline unless WANDB_MODE says otherwise)."""
    device_peak_flops: float | None = Field(None, gt=0.0)
    """Floating-point operations a second of one device at its peak, for MFU; empty: as known for its name."""


class RunConfig(Section):
    """A whole run, from raw text to an exported model."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/<name>."""
    preset: str | None = None
    """A published size (see trainer/presets.py) whose values hold wherever this config says nothing."""
    seed: int = Field(1234, ge=0, lt=2**31)
    """Seed of initial weights, data order and dropout."""
    model: ModelConfig = ModelConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """Length, batch and arithmetic of training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and the learning-rate schedule."""
    stability: StabilityConfig = StabilityConfig()
    """What happens to steps whose loss or gradients are no numbers, or far off."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is laid out over ranks."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How good the model is: on held-out text, and by tasks; may change while a run goes on."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    generate: GenerateConfig = GenerateConfig()
    """The text sample at the end of a run."""
    launch: LaunchConfig = LaunchConfig()
    """Machines, processes and threads."""
    supervise: SuperviseConfig = SuperviseConfig()
    """What happens when ranks or machines fail, hang, leave or come back."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """The page and the metrics of a run; may change while it goes on."""

    @property
    def tokens_per_step(self) -> int:
        """Of the full batch; `trainer.schedule` knows the steps of a ramp."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the full batch on each data-parallel replica."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def ranks_per_node(self) -> int:
        return self.launch.ranks_per_node or self.parallel.num_ranks // self.launch.nodes

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in broken(self, RULES):
            raise ValueError(rule.refusal(self, RULES))
        return self
