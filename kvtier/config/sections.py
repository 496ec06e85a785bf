"""The settings that belong to no tier: how requests use them, what is recorded, what may be asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ValidationInfo, field_validator

from kvtier.config.fields import (
    ON_OFF,
    SIZES,
    Duration,
    OptionalPath,
    Section,
    Size,
    setting,
)


class ConnectorConfig(Section):
    """How the engine's requests use the tiers."""

    store: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Store what requests compute.")
    load: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Load what is stored, instead of computing it again.")
    store_decode_blocks: bool = setting(
        True, kind="boolean", allowed="`true`, `false`", about="Store blocks of generated tokens too, not only those of prompts."
    )
    async_load: bool | None = setting(
        None,
        kind="boolean",
        allowed="null, `true`, `false`",
        about="Load, and put prompts together from chunks, before a request starts and while others run. false: in the step that needs the "
        "blocks, for engines that can take a request back when its load fails. null: false where the engine can.",
    )
    layerwise: Annotated[Literal["auto", "on", "off"], ON_OFF] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `on`, `off`",
        about="Whether copies follow the forward pass layer by layer: a layer waits for its own part of a load only, where loads are part "
        "of a step (`async_load`), and on a GPU is stored as soon as it is computed. `auto`: on where a GPU copies beside the "
        "computation, off on a CPU.",
    )
    promote_wait_s: Duration = setting(
        2.0,
        key="promote_wait",
        kind="duration",
        allowed="0 or more: `2s`, `500ms`, or seconds",
        about="By how much blocks from slower tiers may delay a request, asking shared ones included. It waits four fifths of that, then "
        "computes them.",
    )
    max_pinned_fraction: float = setting(
        0.5, kind="number", allowed="0 to 1", about="Share of host memory that pinned blocks may take.", ge=0, le=1
    )
    load_or_recompute: Literal["auto", "always"] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `always`",
        about="Whether blocks are loaded that the engine would compute faster. `auto`: not, once both were measured. `always`: load.",
    )
    gpu_copy: Literal["auto", "dma", "bulk", "staged", "direct"] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `dma`, `bulk`, `staged`, `direct`",
        about="How blocks are copied to and from a GPU. `auto`: for each direction and size the way that was the fastest at start. "
        "`dma`: the copy engines alone. `bulk`: a kernel straight to host memory (Hopper and later). `staged`: a kernel and a buffer. "
        "`direct`: a kernel that needs neither.",
    )
    copy_threads: int = setting(
        2,
        kind="integer",
        allowed="a whole number from 1 to 16",
        about="Threads that share a large copy between the engine's memory and host memory on a CPU; not more than it has CPUs.",
        ge=1,
        le=16,
    )


class BlendConfig(Section):
    """Chunks of prompts reused at any position. What comes out is an approximation, so a request has to ask for it too."""

    enabled: bool = setting(
        False, kind="boolean", allowed="`true`, `false`", about="Whether requests may reuse chunks (`kv_transfer_params`, key `blend`)."
    )
    separator: str | None = setting(
        None,
        kind="text",
        allowed="null, or a text of at most 1000 characters",
        about="What lies between the chunks of a prompt with `boundaries: separator`, and before the first one and behind the last one, "
        "where the request does not say.",
        min_length=1,
        max_length=1000,
    )
    boundaries: Literal["request", "messages", "separator", "auto"] = setting(
        "request",
        kind="name",
        allowed="`request`, `messages`, `separator` (with `separator`), `auto`",
        about="Where the chunks of a request's prompt begin and end, where the request does not say. `request`: it has to say. `messages`: "
        "with the messages of the chat. `separator`: at each `separator`. `auto`: wherever chunks lie that earlier requests named.",
    )
    method: Literal["none", "cacheblend", "epic", "prophetkv", "cachecraft", "combined"] = setting(
        "combined",
        kind="name",
        allowed="`none`, `cacheblend`, `epic`, `prophetkv`, `cachecraft`, `combined`",
        about="How the tokens of chunks are chosen that are computed anew, where a request does not say.",
    )
    ratio: float = setting(
        0.15, kind="number", allowed="0 to 1", about="Which share of them that is, where a request does not say.", ge=0, le=1
    )
    min_margin: float = setting(
        0.0,
        kind="number",
        allowed="0 to 1",
        about="How sure the model has to be of its first token with chunks reused: by how much that token's probability must exceed the "
        "next likely one's. Where it is less, the engine computes the prompt. 0: nobody looks. A request may say otherwise.",
        ge=0,
        le=1,
    )
    first_layer: float = setting(
        0.4,
        kind="number",
        allowed="0 to 1",
        about="With `combined`: where the layers begin whose KV has to be right, as a share of the model's depth. Tokens are chosen by "
        "what the question looks at there. `kvtier bench blend --layers` finds these layers.",
        ge=0,
        le=1,
    )
    last_layer: float = setting(
        0.8,
        kind="number",
        allowed="more than `first_layer`, to 1",
        validate_default=True,
        about="With `combined`: where they end.",
        gt=0,
        le=1,
    )
    min_reuse: float = setting(
        0.5,
        kind="number",
        allowed="0 to 1",
        about="Which share of what would be covered must come from chunks; below it the whole prompt is computed. With a least margin that "
        "is a share of all of the prompt.",
        ge=0,
        le=1,
    )
    max_step_tokens: int | None = setting(
        None,
        kind="integer",
        allowed="null, or a whole number from 1",
        about="How many tokens the blends of one step may compute; further prompts from chunks wait for the next one, so that those who "
        "generate get their tokens in between. What needs more, a prompt or a chunk that is to be stored, is spread over steps, layer by "
        "layer, in what the engine's own tokens leave of each. null: what the engine computes in a step (`max_num_batched_tokens`).",
        ge=1,
    )
    entries: Literal["computed", "served"] = setting(
        "computed",
        kind="name",
        allowed="`computed`, `served`",
        about="Where the KV of chunks comes from. `computed`: each chunk is computed once more, by itself behind what the prompts begin "
        "with. `served`: it is copied from the first prompt with it that the engine computes, which costs no computing; what stood before "
        "it in that prompt, another user's text of the same tenant perhaps, is in it.",
    )
    primer: OptionalPath = setting(
        None,
        kind="path",
        allowed="null, or a text file",
        about="A neutral document that chunks are computed behind, after what the prompts begin with. Some hundred words; it improves the "
        "answers and costs nothing when a prompt is served. null: none.",
    )

    @field_validator("boundaries")
    @classmethod
    def _with_a_separator(cls, boundaries: str, info: ValidationInfo) -> str:
        if boundaries == "separator" and info.data.get("separator", "") is None:  # absent where it is wrong itself
            raise ValueError("separator is null")
        return boundaries

    @field_validator("last_layer")
    @classmethod
    def _behind_the_first(cls, last_layer: float, info: ValidationInfo) -> float:
        first_layer = info.data.get("first_layer")  # absent where it is wrong itself
        if first_layer is not None and last_layer <= first_layer:
            raise ValueError(f"first_layer is {first_layer:g}")
        return last_layer


class RecordConfig(Section):
    """A recording of the requests and of what the tiers had for them, for `kvtier simulate` and `kvtier plan`."""

    path: OptionalPath = setting(
        None,
        kind="path",
        allowed="null, or a file",
        about="The file to write; where it is there, `.1`, `.2`, ... is added. It holds no prompts and no tokens. null: no recording.",
    )
    max_bytes: Size = setting(
        1 << 30, key="max_size", kind="size", allowed=f"more than 0: {SIZES}", about="Recording ends when the file has grown to this.", gt=0
    )


class ControlConfig(Section):
    """What users and hints may claim."""

    max_pinned_fraction: float = setting(
        0.25,
        kind="number",
        allowed="0 to 1",
        about="Share of host memory that pins of the control API and of hints may keep together.",
        ge=0,
        le=1,
    )


class DaemonConfig(Section):
    """The node daemon (`kvtier serve`), which owns the tiers of all engines of a machine."""

    socket: OptionalPath = setting(
        None,
        kind="path",
        allowed="null, or the path of a Unix socket in a directory that is this user's alone",
        about="Where the daemon is spoken to. The engines use its tiers then and open none of their own; of `tiers` only the daemon "
        "reads. null: each engine has tiers of its own.",
    )
    deadline_s: Duration = setting(
        0.25,
        key="deadline",
        kind="duration",
        allowed="more than 0: `250ms`, `1s`, or seconds",
        about="How long the daemon may keep one step of an engine waiting; then the engine goes on without it.",
        gt=0,
    )
    reconnect_s: Duration = setting(
        1.0,
        key="reconnect",
        kind="duration",
        allowed="more than 0: `1s`, `500ms`, or seconds",
        about="How long an engine waits before it tries again to reach a daemon that was lost.",
        gt=0,
    )
    adopt: bool = setting(
        True,
        kind="boolean",
        allowed="`true`, `false`",
        about="Whether a daemon takes over the host memory of one that died. Then each block that is stored is read once more, for a "
        "checksum. false: host memory begins empty.",
    )
    attach_timeout_s: Duration = setting(
        30.0,
        key="attach_timeout",
        kind="duration",
        allowed="more than 0: `30s`, `2min`, or seconds",
        about="How long the daemon may take to open its tiers for the first engine.",
        gt=0,
    )
