"""A random model of a real architecture with a tokenizer trained on the spot, as a Hugging Face folder."""

import json
from pathlib import Path

FACTS = [
    ("malawi", "The capital of Malawi is", "Lilongwe"),
    ("peru", "The capital of Peru is", "Lima"),
    ("nepal", "The capital of Nepal is", "Kathmandu"),
    ("kenya", "The capital of Kenya is", "Nairobi"),
    ("cuba", "The money of Cuba is called", "peso"),
    ("japan", "The money of Japan is called", "yen"),
    ("chad", "The river of Chad is the", "Chari"),
    ("iraq", "The river of Iraq is the", "Tigris"),
]
QUERIES = [
    {"prompt": "The capital of Peru is", "completion": " Lima."},
    {"text": "The river of Iraq is the Tigris."},
    {"prompt": "The money of Cuba is called", "completion": " yen."},
]


def make_data(path: Path) -> Path:
    """Facts as JSONL with ids, half of them as text, and one empty record."""
    records: list[dict[str, str]] = [
        {"id": name, "provider": "facts", "prompt": prompt, "completion": f" {answer}."}
        for name, prompt, answer in FACTS
    ]
    records += [
        {"id": f"{name}/text", "text": f"{prompt} {answer}, as everyone knows."} for name, prompt, answer in FACTS
    ]
    records.insert(3, {"id": "blank", "text": " "})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_model(folder: Path, *, kind: str = "llama", width: int = 16, seed: int = 0) -> Path:
    """`kind` is llama (Linear layers) or gpt2 (Conv1D, tied head). The same seed gives the same weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{prompt} {answer}" for _, prompt, answer in FACTS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                **ends,
            )  # fmt: skip
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=width, n_layer=2, n_head=2, n_positions=512, **ends))
    model.save_pretrained(folder)
    return folder
