"""Which detokenizer a tokenizer gets: the one whose text is right, whatever its file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm
import mlx_lm.tokenizer_utils
import pytest
from folder import make_folder
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from odd_tokenizers import byte_level, sentence_piece, unigram
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_sink.commands.generate.command import main
from mlx_sink.models import demo
from mlx_sink.stream.text import detokenize
from mlx_sink.stream.text.detokenize import AnyTokenizer, ByteLevel, SentencePiece, detokenizer_for

SPM = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
TEXT = "the naïve café: 語 \U0001f600\n\tdef f(a):\n    return the cat"


def wrapped(tokenizer: Tokenizer, detokenizer: Any) -> TokenizerWrapper:
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer), detokenizer)


def written(tokenizer: Any, tokens: list[int]) -> str:
    detokenizer = detokenizer_for(tokenizer)
    return "".join(map(detokenizer.feed, tokens)) + detokenizer.finish()


def test_a_byte_level_vocabulary_under_a_sentencepiece_decoder():
    """As some Mistral releases are: mlx-lm and transformers print ``theĠcat``."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence(SPM)
    tokenizer = wrapped(tokenizer, SPMStreamingDetokenizer)
    tokens = tokenizer.encode(TEXT)
    assert "Ġ" in tokenizer.decode(tokens)
    assert isinstance(detokenizer_for(tokenizer), ByteLevel)
    assert written(tokenizer, tokens) == TEXT


def test_a_byte_level_vocabulary_that_is_encoded_wrongly_too():
    """Where not even the sample comes through, the words of the vocabulary say what it is."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence(SPM)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = wrapped(tokenizer, SPMStreamingDetokenizer)
    tokens = [tokenizer.convert_tokens_to_ids(word) for word in ("the", "Ġcat", "Ġand", "Ċ")]
    assert written(tokenizer, tokens) == "the cat and\n"


def test_one_that_mlx_lm_takes_for_byte_level():
    tokenizer = wrapped(sentence_piece(), BPEStreamingDetokenizer)
    assert isinstance(detokenizer_for(tokenizer), SentencePiece)
    assert written(tokenizer, tokenizer.encode(TEXT)) == TEXT


def test_spaces_at_the_beginning_of_a_line_decoded_line_by_line():
    """A SentencePiece vocabulary that mlx-lm decodes by lines loses one of them in each."""
    tokenizer = wrapped(sentence_piece(), NaiveStreamingDetokenizer)
    tokens = tokenizer.encode(TEXT)
    theirs = tokenizer.detokenizer
    shown = ""
    for token in tokens:
        theirs.add_token(token)
        shown += theirs.last_segment
    assert shown != tokenizer.decode(tokens) == TEXT
    assert written(tokenizer, tokens) == TEXT


def test_letters_of_the_byte_alphabet_are_no_byte_level_vocabulary():
    """Gemma's has the letter ``ĉ`` for itself, and spaces as SentencePiece writes them."""
    tokenizer = sentence_piece()
    tokenizer.add_tokens([AddedToken(letter, normalized=False) for letter in "ĉĠĊ"])
    tokenizer = wrapped(tokenizer, SPMStreamingDetokenizer)
    assert isinstance(detokenizer_for(tokenizer), SentencePiece)
    tokens = tokenizer.encode("the letter Ġ, and ĉ")
    assert {tokenizer.convert_tokens_to_ids(letter) for letter in "Ġĉ"} < set(tokens)
    assert written(tokenizer, tokens) == tokenizer.decode(tokens)


def lossy() -> Tokenizer:
    """Words only: the sample is unknown to it."""
    words = ["?", "the", "cat", "##s", "!", *(f"w{n}" for n in range(300))]
    tokenizer = Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "theirs", "kind"),
    [
        (byte_level, BPEStreamingDetokenizer, ByteLevel),
        (byte_level, NaiveStreamingDetokenizer, AnyTokenizer),
        (sentence_piece, SPMStreamingDetokenizer, SentencePiece),
        (unigram, NaiveStreamingDetokenizer, AnyTokenizer),
        (lossy, NaiveStreamingDetokenizer, AnyTokenizer),
    ],
)
def test_what_mlx_lm_chose_stays_where_it_is_right(make: Any, theirs: Any, kind: type):
    assert type(detokenizer_for(wrapped(make(), theirs))) is kind


@pytest.mark.parametrize("theirs", [BPEStreamingDetokenizer, SPMStreamingDetokenizer])
def test_the_words_of_a_tokenizer_to_which_the_sample_says_nothing(theirs: Any):
    tokenizer = wrapped(lossy(), theirs)
    assert type(detokenizer_for(tokenizer)) is AnyTokenizer
    assert written(tokenizer, [1, 2, 3]) == tokenizer.decode([1, 2, 3]) == "the cats"


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch):
    tokenizer = wrapped(byte_level(), BPEStreamingDetokenizer)
    proofs: list[object] = []
    prove = detokenize._proven
    monkeypatch.setattr(detokenize, "_proven", lambda t: proofs.append(t) or prove(t))
    first = detokenizer_for(tokenizer)
    second = detokenizer_for(tokenizer)
    assert len(proofs) == 1
    assert first is not second
    first.feed(tokenizer.encode("é")[0])
    assert second.state() == detokenizer_for(tokenizer).state()


def test_the_demo_s_is_mlx_lm_s():
    assert type(detokenizer_for(mlx_lm.tokenizer_utils.load(demo.FOLDER))) is ByteLevel


def test_a_model_folder_with_the_wrong_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Through the command: the same text as from the folder as it should be."""
    texts: list[str] = []
    for name in ("right", "wrong"):
        folder = make_folder(tmp_path / name)
        if name == "wrong":
            file = folder / "tokenizer.json"
            tokenizer = json.loads(file.read_text())
            tokenizer["decoder"] = json.loads(decoders.Sequence(SPM).__getstate__())
            file.write_text(json.dumps(tokenizer))
            chosen = mlx_lm.load(str(folder))[1].detokenizer
            assert type(chosen) is SPMStreamingDetokenizer
        argv = ["--model", str(folder), "-p", "the cat", "-m", "40", "--temp", "1", "--seed", "1"]
        assert main([*argv, "--ignore-eos"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert " " in texts[0]
