"""Measures which backend runs which phase of which architecture, and writes ``docs/models.md``.

    TRITON_INTERPRET=1 python tests/models_matrix.py --write

Every cell is a run of a tiny random model: a prefill of 260 tokens, a question of 2 and a decoded
token through the backend, against the same pipeline on the reference backend and, with everything
selected, against the model's own attention.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import attrs
import models
import torch
import transformers

from sah_core import UnsupportedError, attach, compat

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BACKENDS = ("eager", "gather", "triton")
PHASES = {"prefill": 260, "question": 2, "decode": 1}
BATCHES = {"one sequence": 0, "left-padded batch": 40}
STEPS = "sink(2) | local(2) | oracle-top-k(2)"
TITLES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3-MoE",
    "qwen3-next": "Qwen3-Next",
    "phi3": "Phi-3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gpt-oss": "gpt-oss",
    "cohere2": "Cohere2",
    "glm4": "GLM-4",
    "smollm3": "SmolLM3",
    "deepseek-v3": "DeepSeek-V3",
}
STRANGERS = {
    "Bloom (ALiBi)": ("BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "MPT (ALiBi)": ("MptConfig", {"d_model": 16, "n_layers": 1, "n_heads": 2}),
    "GPT-2 with cross attention": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "add_cross_attention": True, "is_decoder": True},
    ),
    "BERT (bidirectional)": (
        "BertConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "initializer_range": 0.3,
        },
    ),
    "Mamba": (
        "MambaConfig",
        {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2},
    ),
    "RecurrentGemma (reads several tokens at a time otherwise)": (
        "RecurrentGemmaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "lru_width": 16,
            "initializer_range": 0.3,
        },
    ),
    "DiffLlama (two attentions per layer)": (
        "DiffLlamaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    ),
    "Doge (computes a mask of its own)": (
        "DogeConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "Llama with the window of a Mistral in its configuration": (
        "LlamaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "sliding_window": 4096,
        },
    ),
    "DeepSeek-V3.2 (its own sparse attention)": (
        "DeepseekV32Config",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}


@attrs.define
class Notes:
    """Numbered reasons."""

    reasons: list[str] = attrs.field(factory=list)

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def attention_types(model):
    """The layer types of a model that attend."""
    types = dict.fromkeys(compat.layer_types(model))
    return [kind for kind in types if kind.endswith("_attention") and "linear" not in kind]


def inputs(padding):
    """Token ids, mask and positions of two rows, or one."""
    length = sum(PHASES.values())
    ids = models.tokens(2 if padding else 1, length, seed=3)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :padding] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def run(model, padding, pipeline=None):
    """Logits of the real tokens per phase, and what the backend refused in it."""
    ids, mask, position = inputs(padding)
    kv_cache = compat.make_cache(model, ids.shape[1])
    argument = compat.cache_argument(type(model).forward)
    logits, refusals, end = {}, {}, 0

    def step(phase, session=None):
        nonlocal end
        begin, end = end, end + PHASES[phase]
        output = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=position[:, begin:end],
            use_cache=True,
            **{argument: kv_cache},
        )
        logits[phase] = output.logits[mask[:, begin:end].bool()]
        if session is not None:
            refusals[phase] = session.fallbacks[0].reason if session.fallbacks else None

    if pipeline is None:
        for phase in PHASES:
            step(phase)
        return logits, refusals
    with attach(model, pipeline) as session:
        for phase in PHASES:
            session.choice.forget()  # a refusal is noted once per kind of call
            step(phase, session)
    return logits, refusals


def distance(one, other):
    """The largest difference of two tensors."""
    return float((one - other).abs().max())


def measure(family, notes):
    """The cells of one architecture: per backend, batch and phase."""
    model = models.build(family)
    compat.keep_softcap(model)
    where = f"prefill=sparse, layer_types=[{', '.join(attention_types(model))}]"
    cells = {}
    for batch, padding in BATCHES.items():
        dense, _ = run(model, padding)
        reference, _ = run(model, padding, f"{STEPS} @ {where}, backend=eager")
        for backend in BACKENDS:
            own, refused = run(model, padding, f"{STEPS} @ {where}, backend={backend}")
            whole = dense
            if backend != "triton":  # which takes minutes in the interpreter
                whole, _ = run(model, padding, f"sink(1000) @ {where}, backend={backend}")
            for phase in PHASES:
                unit = float(dense[phase].std())
                same = distance(own[phase], reference[phase]) < 1e-3 * unit
                equal = distance(whole[phase], dense[phase]) < 1e-3 * unit
                changed = distance(own[phase], dense[phase]) > 5e-2 * unit
                if not (same and equal and changed):
                    cells[backend, batch, phase] = "WRONG"
                elif refused[phase] is not None:
                    cells[backend, batch, phase] = f"refused ({notes.number(refused[phase])})"
                else:
                    cells[backend, batch, phase] = "works"
    return cells


def facts(family):
    """What an architecture is to the core, read off a running model."""
    model = models.build(family)
    kv_cache = compat.make_cache(model, 16)
    argument = compat.cache_argument(type(model).forward)
    shapes = []

    class Seen:
        from sah_core import hookimpl

        @hookimpl
        def sah_mask_built(self, inputs):
            shapes.append(
                (inputs.query.shape[3], inputs.value.shape[3], inputs.softcap, inputs.sinks)
            )

    where = f"prefill=sparse, layer_types=[{', '.join(attention_types(model))}]"
    with attach(model, f"local(1.0) @ {where}", observers=[Seen()]):
        model(models.tokens(1, 12), use_cache=True, **{argument: kv_cache})
    key, value, softcap, sinks = shapes[0]
    extras = [f"key size {key}, value size {value}" if key != value else ""]
    extras += ["softcap" if softcap else "", "learned sinks" if sinks is not None else ""]
    extras += ["caches latents" if compat.caches_latents(model) else ""]
    types = dict.fromkeys(kind.removesuffix("_attention") for kind in compat.layer_types(model))
    kinds = dict.fromkeys(str(compat.kind_of(layer)) for layer in kv_cache.layers)
    return [
        TITLES[family],
        ", ".join(types),
        ", ".join(kinds),
        ", ".join(extra for extra in extras if extra) or "-",
    ]


def refusal(name, options):
    """What a model that is not known is told."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(vocab_size=64, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    try:
        with attach(model, "local(2)"):
            return "WRONG: it is not refused"
    except UnsupportedError as error:
        return str(error)


def table(head, rows):
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def page():
    """The whole page."""
    notes, families = Notes(), list(TITLES)
    cells = {family: measure(family, notes) for family in families}
    lines = [
        "# Models",
        "",
        "Generated by `TRITON_INTERPRET=1 python tests/models_matrix.py --write`; a test compares "
        "this page with what it",
        "measures. Each cell is a run of a tiny random model in float32: a prefill of 260 tokens, "
        "a question of 2 and one",
        f"decoded token through `{STEPS}`, equal to the reference `eager`, which equals",
        "the model's own attention when everything is selected, as `gather` does. A refused call "
        "runs on another backend, and the",
        "session says so. Triton ran in its interpreter.",
        "",
    ]
    head = ["architecture", *(f"{phase}, {batch}" for batch in BATCHES for phase in PHASES)]
    for backend in BACKENDS:
        rows = [
            [TITLES[f], *(cells[f][backend, b, p] for b in BATCHES for p in PHASES)]
            for f in families
        ]
        lines += [f"## Backend `{backend}`", "", *table(head, rows), ""]
    lines += [*(f"({i + 1}) {reason}.  " for i, reason in enumerate(notes.reasons)), ""]
    lines += [
        "## What the layers are",
        "",
        "Pipelines leave all but the full-attention layers alone unless `layer_types` says "
        "otherwise; linear layers always.",
        "A cache layer goes back to the end of the context by its `length`, by `reference` to "
        "tensors that are never written",
        "to, or by `copy`.",
        "",
        *table(
            ["architecture", "layers", "cache goes back by", "beyond the plain form"],
            [facts(family) for family in families],
        ),
        "",
        "## More families",
        "",
        "`tests/sah_plugins/test_more_models.py` tries these with `eager` and `gather`: with "
        "everything selected they equal their",
        "own attention, in one pass and piece by piece; with a selection no row changes with a "
        "later token; left padding changes",
        "nothing. "
        + ", ".join(sorted(n.removesuffix("Config") for n, _ in models.MORE.values()))
        + ".",
        "",
        "## Refused",
        "",
        "Every decoder of transformers is tried on a few tokens before it is patched: its own "
        "attention in one pass, and ours",
        "with everything selected, in pieces on a cache (prefill, question, decode steps), each of "
        "which must be right. What",
        "differs, attends to anything but its own text, keeps a cache whose way back is not known, "
        "or one that forgets what its",
        "attention may read, is refused. So is a left-padded batch, if padding changes the logits. "
        "What is refused here may still",
        "run `dense`, if its own attention reads a text in pieces as at once.",
        "",
        *table(["model", "error"], [[name, refusal(*s)] for name, s in STRANGERS.items()]),
        "",
    ]
    return "\n".join(lines)


def main():
    """Print the page, or write it."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        text = page()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
