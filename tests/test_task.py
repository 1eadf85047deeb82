"""Which tokens are targets, how documents are split, and what a batch's losses are: against losses written by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from influent.errors import DataError, SpecError
from influent.task import CausalLM, Classification, Encodes, Task, describe

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = len(SPECIAL) + 256
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "Why?"},
]


def make_tokenizer(
    *, bos: bool = False, eos: bool = False, chat: str | None = None, merges: list[tuple[str, str]] | None = None,
    pad: str | None = "</s>",
) -> Any:  # fmt: skip
    """One token a byte, plus `merges`; `bos` and `eos` say what it puts around a text."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges or [])]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)
    fast.chat_template = chat
    return fast


def task(max_length: int = 512, reduction: str = "sum", **options: Any) -> CausalLM:
    return CausalLM(make_tokenizer(**options), max_length=max_length, reduction=reduction)


def targets(task: CausalLM, example: dict[str, Any]) -> str:
    """The target tokens of a record, as text."""
    ids = [i for part in task.parts(example) for i, wanted in zip(*part.inputs[:2], strict=True) if wanted]
    return task.tokenizer.decode(ids)


def read(task: CausalLM, example: dict[str, Any]) -> str:
    """What the model reads of a record that fits in one part, as text."""
    (part,) = task.parts(example)
    return task.tokenizer.decode(part.inputs[0])


def test_protocols():
    assert isinstance(task(), Task) and isinstance(task(), Encodes)
    assert isinstance(Classification(), Task) and not isinstance(Classification(), Encodes)


@pytest.mark.parametrize(
    "bos, eos, whole, wanted",
    [
        (False, False, "hello", "ello"),
        (True, False, "<s>hello", "hello"),
        (False, True, "hello</s>", "ello</s>"),
        (True, True, "<s>hello</s>", "hello</s>"),
    ],
)
def test_every_token_of_a_text_but_the_first_is_a_target(bos, eos, whole, wanted):
    lm = task(bos=bos, eos=eos)
    assert read(lm, {"text": "hello"}) == whole
    assert targets(lm, {"text": "hello"}) == wanted
    assert [part.targets for part in lm.parts({"text": "hello"})] == [
        len(whole.replace("<s>", "b").replace("</s>", "e")) - 1
    ]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_the_completion_is_the_target(bos, eos):
    lm = task(bos=bos, eos=eos)
    example = {"prompt": "2+2=", "completion": "four"}
    assert read(lm, example) == ("<s>" if bos else "") + "2+2=four"  # no closing token between the two
    assert targets(lm, example) == "four"


def test_a_prompt_that_ends_with_the_closing_token_keeps_it():
    for eos in (False, True):
        assert read(task(eos=eos), {"prompt": "a</s>", "completion": "b"}).startswith("a</s>")
        assert targets(task(eos=eos), {"prompt": "a</s>", "completion": "b"}) == "b"


def test_an_empty_prompt_is_the_opening_token():
    for bos in (False, True):
        assert targets(task(bos=bos), {"prompt": "", "completion": "four"}) == "four"


def test_a_chat_that_the_template_refuses_is_a_mistake_in_the_data():
    lm = task(chat="{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(DataError, match="chat template refuses the messages: Roles must alternate"):
        lm.parts({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


def test_no_token_reaches_over_the_end_of_the_prompt():
    lm = task(merges=[("a", "b")])
    assert len(lm.parts({"text": "cab"})[0].inputs[0]) == 2
    assert targets(lm, {"prompt": "ca", "completion": "bd"}) == "bd"


@pytest.mark.parametrize("bos, eos", [(False, False), (True, True)])
def test_the_assistants_tokens_are_the_targets(bos, eos):
    lm = task(bos=bos, eos=eos, chat=CHAT)
    whole = "<s><|system|>Be brief.</s><|user|>Two?</s><|assistant|>yes</s><|user|>Sure?</s><|assistant|>no</s>"
    assert read(lm, {"messages": TALK}) == whole  # the template opens the text: the tokenizer adds nothing
    assert targets(lm, {"messages": TALK}) == "yes</s>no</s>"
    (part,) = lm.parts({"messages": TALK})
    assert part.targets == len("yes") + 1 + len("no") + 1


def test_messages_without_an_assistant_have_no_target():
    assert task(chat=CHAT).parts({"messages": TALK[:2]}) == []


def test_an_assistant_who_opens_the_conversation():
    assert targets(task(chat=CHAT), {"messages": [TALK[2], TALK[1]]}) == "<|assistant|>yes</s>"


def test_messages_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match="no chat template; use prompt and completion"):
        task().parts({"messages": TALK})
    rewriting = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier messages"):
        task(chat=rewriting).parts({"messages": TALK})


def test_texts_of_one_token_give_no_part():
    assert task().parts({"text": "a"}) == []
    assert len(task(bos=True).parts({"text": "a"})) == 1
    assert len(task(eos=True).parts({"text": "a"})) == 1


@settings(deadline=None)
@given(length=st.integers(1, 60), prompt=st.integers(1, 40), max_length=st.integers(2, 20))
def test_a_split_document_has_each_target_once_after_what_stands_before_it(length, prompt, max_length):
    lm = CausalLM(TOKENIZER, max_length=max_length)
    letters = "".join(chr(65 + i % 26) + chr(97 + i // 26) for i in range(60))  # no pair of neighbours occurs twice
    for example, ids, first in [
        ({"text": letters[:length]}, letters[:length], 1),
        (
            {"prompt": letters[:prompt], "completion": letters[prompt : prompt + length]},
            letters[: prompt + length],
            prompt,
        ),
    ]:
        expected = [(a, b) for i, (a, b) in enumerate(zip(ids, ids[1:], strict=False)) if i + 1 >= first]
        parts = lm.parts(example)
        got = []
        for part in parts:
            tokens, wanted, weight = part.inputs
            text = TOKENIZER.decode(tokens)
            assert text in ids and weight == 1.0
            assert len(tokens) == len(wanted) == part.length <= max_length
            assert not wanted[0] and sum(wanted) == part.targets > 0
            got += [(text[i - 1], text[i]) for i in range(1, len(text)) if wanted[i]]
        assert got == expected
        assert len(parts) <= -(-max(len(ids) - 1, 1) // (max_length - 1))


TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("length", [3, 7, 30])
def test_the_mean_is_over_the_targets_of_the_whole_document(length):
    parts = task(max_length=5, reduction="mean").parts({"text": "x" * length})
    weights = {part.inputs[2] for part in parts}
    assert weights == {1 / (length - 1)}
    assert sum(part.targets for part in parts) == length - 1
    answer = {"prompt": "x" * length, "completion": "yyy"}
    assert {part.inputs[2] for part in task(max_length=5, reduction="mean").parts(answer)} == {1 / 3}


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_length": 0}, {"reduction": "max"}])
def test_meaningless_options_are_refused(options):
    with pytest.raises(SpecError, match="expected"):
        CausalLM(TOKENIZER, **options)


def test_the_description_follows_the_tokenizer_and_the_options():
    swapped = make_tokenizer(merges=[("a", "b")])
    other = make_tokenizer(merges=[("q", "z")])  # the same size; no text that could be tried has "qz" in it
    every = [
        task(), task(bos=True), task(eos=True), task(chat=CHAT), CausalLM(swapped), CausalLM(other),
        task(max_length=99), task(reduction="mean"),
    ]  # fmt: skip
    described = [lm.describe() for lm in every]
    assert all(a != b for i, a in enumerate(described) for b in described[:i])
    assert task().describe() == described[0]
    assert describe(every[0]) == described[0]
    assert describe(Classification()) == {"kind": "influent.task.Classification"}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, pad_token_id=1,
            )
        ).eval()  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


TEXTS = [
    {"text": "The capital of Peru is Lima."}, {"text": "ab"}, {"prompt": "2+2=", "completion": "4"},
    {"prompt": "Tell me a story. ", "completion": "Once upon a time"}, {"messages": TALK[1:3]},
]  # fmt: skip


def by_hand(model: nn.Module, lm: CausalLM, example: dict[str, Any]) -> float:
    """The sum of -log p of each target given what is before it, a prefix at a time."""
    total = 0.0
    for part in lm.parts(example):
        ids, wanted, weight = part.inputs
        for i in range(1, len(ids)):
            if wanted[i]:
                logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double()
                total -= float(logits[ids[i]] - logits.logsumexp(0)) * weight
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@torch.no_grad()
def test_losses_are_those_of_each_prefix_alone(kind, reduction):
    model, lm = make_model(kind), task(chat=CHAT, reduction=reduction)
    parts = [part for example in TEXTS for part in lm.parts(example)]
    losses = lm.loss(model, lm.collate(parts))
    expected = torch.tensor([by_hand(model, lm, example) for example in TEXTS])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lm.measure(model, lm.collate(parts)), losses)
    split = task(chat=CHAT, reduction=reduction, max_length=9)
    summed = [float(split.loss(model, split.collate(split.parts(example))).sum()) for example in TEXTS]
    assert summed == pytest.approx([by_hand(model, split, example) for example in TEXTS], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_padding_changes_no_loss_though_there_is_no_attention_mask(kind):
    model, lm = make_model(kind), task(chat=CHAT)
    parts = [part for example in TEXTS for part in lm.parts(example)]
    batch = lm.collate(parts)
    assert set(batch) == {"input_ids", "labels", "weight"}
    together = lm.loss(model, batch)
    alone = torch.cat([lm.loss(model, lm.collate([part])) for part in parts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    longest = max(part.length for part in parts)
    for row, part in enumerate(parts):
        batch["input_ids"][row, part.length :] = torch.randint(0, VOCABULARY, (longest - part.length,))
    torch.testing.assert_close(lm.loss(model, batch), together, rtol=1e-5, atol=1e-5)


def test_a_batch_is_padded_on_the_right_and_pads_are_no_targets():
    lm = task()
    parts = [part for text in ("abc", "a b c d") for part in lm.parts({"text": text})]
    batch = lm.collate(parts)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    assert batch["input_ids"][0, 3:].tolist() == [0] * 4  # never the tokenizer's, which may lie past the embedding
    assert batch["labels"][0].tolist() == [-100, *batch["input_ids"][0, 1:3].tolist(), *[-100] * 4]
    assert batch["weight"].tolist() == [1.0, 1.0]


def test_a_padding_token_in_the_text_is_a_target_all_the_same():
    lm = task(eos=True)  # its closing token is its padding token
    (part,) = lm.parts({"text": "ab"})
    assert lm.collate([part])["labels"].tolist() == [[-100, part.inputs[0][1], 1]]


def test_half_precision_logits_give_float32_losses():
    model, lm = make_model("llama").bfloat16(), task()
    losses = lm.loss(model, lm.collate(lm.parts({"text": "hello"})))
    assert losses.dtype == torch.float32


def test_a_query_may_ask_about_the_margin_of_a_label():
    torch.manual_seed(0)
    net, batch = torch.nn.Linear(5, 3).double(), (torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 1]))
    p = net(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    task = Classification("margin")
    torch.testing.assert_close(task.measure(net, batch), torch.log((1 - p) / p))
    torch.testing.assert_close(task.loss(net, batch), Classification().measure(net, batch))
    with pytest.raises(SpecError, match="'accuracy', expected loss or margin"):
        Classification("accuracy")


def test_classification_is_the_cross_entropy_of_each_example():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    losses = Classification().loss(model, (x, y))
    expected = -model(x).log_softmax(1)[torch.arange(5), y]
    torch.testing.assert_close(losses, expected)
    assert torch.equal(Classification().measure(model, (x, y)), losses)
