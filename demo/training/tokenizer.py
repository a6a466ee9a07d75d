"""Builds the demonstration models' tokenizers: the families' own kinds of BPE, small.

The merges are learned from the questions and answers that the scenes give, so that their words are one token
each; the 256 bytes stay, so any other text can be written too, only with more tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drawing import COLOURS, SHAPES
from family import CHECKPOINTS
from scenes import PLACES, SCENES, SMALL_TALK, TRAINING_SEEDS, make_scene, plural

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MINICPM_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<ref>", "</ref>", "<box>",
    "</box>", "<quad>", "</quad>", "<point>", "</point>", "<slice>", "</slice>", "<image_id>",
    "</image_id>", "<unk>",
)  # fmt: skip
LLAVA_TOKENS = ("<image>", "<pad>")
PHI_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def corpus(scenes_per_kind: int = 1500) -> list[str]:
    """Text in which every word of the demonstration occurs."""
    lines = [
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
        "USER: What ASSISTANT: red",
        "Picture 1: Picture 2: Video 1: ",
    ] * 50
    for word in (*COLOURS, *SHAPES, *map(plural, SHAPES), *PLACES):
        lines += [word, f" {word}"] * 50
    for question, answer in SMALL_TALK.items():
        lines += [question, answer] * 20
    for name in SCENES:
        for seed in range(TRAINING_SEEDS[0], TRAINING_SEEDS[0] + scenes_per_kind):
            for _, question, answer in make_scene(name, seed).questions:
                lines += [question, f"assistant\n{answer}"]
    return lines


def byte_level(special: Sequence[str], vocabulary: int = 1010) -> Tokenizer:
    """Qwen2's kind: bytes, words with the space before them, every digit for itself."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def sentence_pieces(special: Sequence[str], swallows: Sequence[str] = (), vocabulary: int = 640) -> Tokenizer:
    """Llama's kind: characters with a mark for spaces, unknown ones as bytes, no words set apart.

    Args:
        special: tokens behind the learned ones.
        swallows: those of them that take the white space behind them with them.
        vocabulary: most tokens before the special ones.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Only while merges are learned: so that none reaches from one word into the next.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Split(Regex(r"\n|\p{N}|[^\p{L}\p{N}▁]"), behavior="isolated"),
        ]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(first), show_progress=False)
    learner.train_from_iterator(corpus(), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted((t for t in learned["vocab"] if t != "\n"), key=learned["vocab"].__getitem__)
    vocab = {token: i for i, token in enumerate([*first, *tokens])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = learner.normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=token in swallows)
            for token in ("<unk>", "<s>", "</s>", *special)
        ]
    )
    return tokenizer


def added(tokenizer: Tokenizer) -> dict[str, Any]:
    """added_tokens_decoder of tokenizer_config.json."""
    return {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, Any], template: str | None = None) -> None:
    """Writes the tokenizer's files as they lie in a hub repository; `template`: in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"added_tokens_decoder": added(tokenizer), "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}, indent=2) + "\n")


QWEN_CONFIG = {
    "add_prefix_space": False,
    "errors": "replace",
    "eos_token": "<|im_end|>",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
}
LLAMA_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "legacy": False,
    "model_max_length": 4096,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}


def build(family: str, folder: Path) -> Tokenizer:
    """Builds and writes a family's tokenizer."""
    if family == "qwen2vl":
        tokenizer = byte_level(QWEN_TOKENS)
        config = {
            **QWEN_CONFIG,
            "additional_special_tokens": list(QWEN_TOKENS[1:]),
            "bos_token": None,
            "chat_template": QWEN_TEMPLATE,
            "padding_side": "left",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        save(tokenizer, folder, config, QWEN_TEMPLATE)
        tokenizer.model.save(str(folder))
    elif family == "minicpmv":
        tokenizer = byte_level(MINICPM_TOKENS)
        config = {
            **QWEN_CONFIG,
            "additional_special_tokens": list(MINICPM_TOKENS[3:-1]),
            "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
            "bos_token": "<|im_start|>",
            "chat_template": CHATML_TEMPLATE,
            "tokenizer_class": "MiniCPMVTokenizer",
            "unk_token": "<unk>",
        }
        save(tokenizer, folder, config)
        tokenizer.model.save(str(folder))
    elif family == "llava":
        tokenizer = sentence_pieces(LLAVA_TOKENS)
        config = {
            **LLAMA_CONFIG,
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        }
        save(tokenizer, folder, config, LLAVA_TEMPLATE)
    else:
        tokenizer = sentence_pieces(PHI_TOKENS, swallows=("<|assistant|>", "<|image|>"))
        config = {
            **LLAMA_CONFIG,
            "additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>", "<|end|>"],
            "chat_template": PHI_TEMPLATE,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
        }
        save(tokenizer, folder, config)
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("qwen2vl", "llava", "phi3v", "minicpmv"), required=True)
    parser.add_argument(
        "--folder", type=Path, help="where the files go; the family's checkpoint unless given"
    )
    arguments = parser.parse_args()
    family = arguments.family
    target = arguments.folder or CHECKPOINTS / f"tiny_{family}/src/opsin_tiny_{family}/model"
    print(f"{build(family, target).get_vocab_size()} tokens in {target}")
