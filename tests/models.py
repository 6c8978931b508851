"""Tiny random models and a tiny tokenizer, built in milliseconds."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # at the usual 0.02, softcap and sinks hardly change the logits
    "initializer_range": 0.3,
    # tied, Gemma's scaled embeddings make it repeat its input whatever the attention says
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "phi3": ("Phi3Config", {"head_dim": None}),
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "glm4": ("Glm4Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "head_dim": None,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 20,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}
LATENTS = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
WINDOW = {"sliding_window": 8, "num_hidden_layers": 4}
MORE = {
    "apertus": ("ApertusConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "cohere": ("CohereConfig", {}),
    "cohere2-moe": ("Cohere2MoeConfig", {**WINDOW, **EXPERTS}),
    "deepseek-v2": ("DeepseekV2Config", LATENTS),
    "dots1": ("Dots1Config", {**LATENTS, "head_dim": 16, "num_key_value_heads": 2}),
    "ernie4.5": ("Ernie4_5Config", {}),
    "exaone4": ("Exaone4Config", WINDOW),
    "gemma": ("GemmaConfig", {}),
    "glm": ("GlmConfig", {}),
    "glm4-moe": ("Glm4MoeConfig", {**LATENTS, "head_dim": 16, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"head_dim": None, "num_key_value_heads": None}),
    "gptj": ("GPTJConfig", {"head_dim": None, "num_key_value_heads": None, "rotary_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", {"head_dim": None, "num_key_value_heads": None}),
    "granite": ("GraniteConfig", {}),
    "helium": ("HeliumConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "llama4": (
        "Llama4TextConfig",
        {**EXPERTS, "attention_chunk_size": 8, "num_hidden_layers": 4, "intermediate_size_mlp": 96},
    ),
    "minimax-m2": ("MiniMaxM2Config", EXPERTS),
    "ministral": ("MinistralConfig", WINDOW),
    "mixtral": ("MixtralConfig", EXPERTS),
    "nemotron": ("NemotronConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", WINDOW),
    "olmoe": ("OlmoeConfig", EXPERTS),
    "opt": ("OPTConfig", {"head_dim": None, "num_key_value_heads": None, "ffn_dim": 96}),
    "persimmon": ("PersimmonConfig", {"head_dim": None, "num_key_value_heads": None}),
    "phi": ("PhiConfig", {"head_dim": None}),
    "qwen2-moe": ("Qwen2MoeConfig", EXPERTS),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "seed-oss": ("SeedOssConfig", {}),
    "stablelm": ("StableLmConfig", {"head_dim": None}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 8}),
}
"""Families that are tried for equality and causality alone."""

SPECIALS = ("<pad>", "<s>", "</s>", "<|end|>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
MERGES = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ou", "ha"]
MERGES += ["the", "and", "\n\n", "? ", ". ", ".\n", " t", "  ", "an\n", " b", "a b"]

PLAIN_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
BOS_CHAT = "{{ bos_token }}" + PLAIN_CHAT
TRIMMING_CHAT = PLAIN_CHAT.replace("m['content']", "m['content'] | trim")


def config(family, **options):
    """The configuration of a tiny model."""
    name, extra = {**FAMILIES, **MORE}[family]
    values = {**COMMON, **extra, **options}
    # some families have no such setting, or derive it
    given = {key: value for key, value in values.items() if value is not None}
    return getattr(transformers, name)(**given)


def build(family, seed=0, *, of=None, **options):
    """A tiny random model in float32; ``of`` builds it around an existing configuration."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(family, **options) if of is None else of)
    return made.eval()


def tokens(*shape, seed=0):
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), COMMON["vocab_size"], shape, generator=generator)


def tokenizer(*, adds_bos=True, adds_eos=False, chat=None):
    """Characters and a few merges, some of which reach over the end of a line or sentence."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    pairs = []
    for merge in MERGES:
        split = next(
            i for i in range(len(merge) - 1, 0, -1) if {merge[:i], merge[i:]} <= set(vocabulary)
        )
        pairs.append((merge[:split], merge[split:]))
        vocabulary[merge] = len(vocabulary)
    backend = Tokenizer(BPE(vocabulary, pairs, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    form = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
    if form != "$A":
        backend.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|end|>"],
        chat_template=chat,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
