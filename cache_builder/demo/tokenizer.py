"""Small byte-level tokenizers for the bundled backbones, learned from the toy world's own sentences.

Every string has tokens, because single bytes are in the vocabulary. Families differ in their special tokens, and so do
these:

    clip    <bos> a red cup <eos> <pad> <pad>      <pad> 0, <eos> the largest id: where a CLIP tower pools (`argmax`)
    gemma   a red cup <eos> <pad> <pad>            <pad> 0, <eos> 1, no begin: SigLIP2 pools the last position
    llama   <bos> a red cup                        <bos> 1, <eos> 2, and <image>, which stands for the patches
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"


def learn_clip_tokenizer(
    texts: Iterable[str], context_length: int, n_merged: int = 1200
) -> PreTrainedTokenizerFast:
    """Begin and end around every text; at most `n_merged` entries besides them."""
    tokenizer = _learn(texts, n_merged, [PAD])
    tokenizer.add_special_tokens([BOS, EOS])  # after training: they take the two largest ids
    assert tokenizer.token_to_id(PAD) == 0
    assert tokenizer.token_to_id(EOS) == tokenizer.get_vocab_size() - 1
    return _wrapped(tokenizer, f"{BOS} $A {EOS}", context_length, bos_token=BOS)


def learn_gemma_tokenizer(
    texts: Iterable[str], context_length: int, n_merged: int = 1200
) -> PreTrainedTokenizerFast:
    """An end after every text, and no begin."""
    tokenizer = _learn(texts, n_merged, [PAD, EOS, BOS, UNK])
    return _wrapped(tokenizer, f"$A {EOS}", context_length, bos_token=BOS, unk_token=UNK)


def learn_llama_tokenizer(
    texts: Iterable[str], context_length: int, n_merged: int = 1200
) -> PreTrainedTokenizerFast:
    """A begin before every text, no end; `<image>` is one token."""
    tokenizer = _learn(texts, n_merged, [PAD, BOS, EOS, IMAGE])
    return _wrapped(
        tokenizer,
        f"{BOS} $A",
        context_length,
        names=["input_ids", "attention_mask"],
        bos_token=BOS,
        additional_special_tokens=[IMAGE],
    )


def _learn(texts: Iterable[str], n_merged: int, specials: Sequence[str]) -> Tokenizer:
    """Byte-pair merges on lower-cased texts; `specials` take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_merged,
        min_frequency=8,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wrapped(
    tokenizer: Tokenizer,
    template: str,
    context_length: int,
    *,
    names: Sequence[str] = ("input_ids",),
    **specials: object,
) -> PreTrainedTokenizerFast:
    used = [(t, tokenizer.token_to_id(t)) for t in template.split() if t != "$A"]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="right",
        model_max_length=context_length,
        model_input_names=list(names),
        **specials,
    )
