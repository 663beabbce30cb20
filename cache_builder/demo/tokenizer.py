"""A small byte-level tokenizer for the bundled backbones, learned from the toy world's own sentences.

Every string has tokens, because single bytes are in the vocabulary. The end token has the largest
id, which is where a CLIP text tower reads its pooled state (`argmax`), and padding is 0.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def learn_tokenizer(
    texts: Iterable[str], context_length: int, n_merged: int = 1200
) -> PreTrainedTokenizerFast:
    """Learn byte-pair merges on lower-cased texts; at most `n_merged` entries besides begin and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_merged,
        min_frequency=8,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([BOS, EOS])  # after training: they take the two largest ids
    ids = {token: tokenizer.token_to_id(token) for token in (PAD, BOS, EOS)}
    assert ids[PAD] == 0
    assert ids[EOS] == tokenizer.get_vocab_size() - 1
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=context_length,
        model_input_names=["input_ids"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json beside a checkpoint."""
    tokenizer.save_pretrained(str(out))
