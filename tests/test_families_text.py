"""The text encoders of DALL·E Mini and ruDALL-E give the ids of the originals."""

import json

import pytest

from dall3.text import KnownWords, load_text_encoder, load_tokenizer, tokenizer_json

from originals import GOLDEN

MINI, RU = GOLDEN / "tokenizer_mini", GOLDEN / "tokenizer_ru"
MINI_CASES = json.loads((MINI / "cases.json").read_text(encoding="utf-8"))["cases"]
RU_CASES = json.loads((RU / "yttm.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", MINI_CASES, ids=lambda case: repr(case["text"][:20]))
def test_dalle_mini_ids(case):
    encode = load_text_encoder(MINI, kind="dalle-mini")
    ids = case["ids"] if len(case["ids"]) <= 64 else [*case["ids"][:63], 2]
    for text in (case["text"], case.get("demojized", case["text"])):
        assert encode(text, truncate=True).tolist() == [*ids, *[1] * (64 - len(ids))]
    whole = load_text_encoder(MINI, kind="dalle-mini", text_seq_len=len(case["ids"]))
    assert whole(case["text"]).tolist() == case["ids"]


@pytest.mark.parametrize("case", RU_CASES, ids=lambda case: repr(case["text"][:20]))
def test_rudalle_ids(case):
    encode = load_text_encoder(RU / "bpe.model", kind="rudalle", text_seq_len=case["text_seq_length"])
    ids = encode(case["text"], truncate=True)
    assert ids.tolist() == case["ids"]
    assert encode.decode(ids) == case["decoded"]


def test_the_files_of_dalle_mini_are_found(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        mini = name.replace(".", "_mini.")
        (tmp_path / mini).write_bytes((MINI / name).read_bytes())
    by_any = [MINI / "vocab.json", (MINI / "vocab.json", MINI / "merges.txt"), tmp_path, tmp_path / "vocab_mini.json"]
    for path in by_any:
        assert load_text_encoder(path, kind="dalle-mini")("a hat")[:3].tolist() == [0, 260, 365]
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(load_tokenizer(MINI / "vocab.json")), encoding="utf-8")
    encode = load_text_encoder(tmp_path / "tokenizer.json", kind="dalle-mini")
    assert (
        encode("naïve café\t<s> 🥑")[:30].tolist()
        == load_text_encoder(MINI, kind="dalle-mini")("naïve café\t<s> 🥑")[:30].tolist()
    )
    assert encode.decode(encode("a hat")) == "a hat"
    (tmp_path / "merges_mini.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges_mini.txt"):
        load_tokenizer(tmp_path / "vocab_mini.json")


def test_the_last_merge_needs_no_newline(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "Ġ": 4, "a": 5, "Ġa": 6}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a", encoding="utf-8")
    assert load_text_encoder(tmp_path, kind="dalle-mini", text_seq_len=4)("a b", truncate=True).tolist() == [0, 6, 4, 2]


def test_long_prompts_are_refused_or_cut():
    encode = load_text_encoder(MINI, kind="dalle-mini", text_seq_len=4)
    with pytest.raises(ValueError, match="has 5 tokens; expected at most 4.*truncate=True"):
        encode("a hat a")
    assert encode("a hat a", truncate=True).tolist() == [0, 260, 365, 2]
    with pytest.raises(ValueError, match="id 365; the transformer has ids 0 to 299"):
        load_text_encoder(MINI, kind="dalle-mini", num_text_tokens=300)("a hat")


@pytest.mark.parametrize(
    ("kind", "path", "unread", "read"),
    [
        ("dalle-mini", MINI, "привет мир", "un café à Paris 🥑"),
        ("dalle-mini", MINI, "日本語", "🥑"),
        ("rudalle", RU / "bpe.model", "a rainbow", "кресло like an avocado, 3d"),
        ("rudalle", RU / "bpe.model", "漢字", "кот"),
        ("dalle-pytorch", GOLDEN / "tokenizer" / "bpe.model", "привет мир", "a cube made of wool"),
    ],
)
def test_a_prompt_in_another_language_is_an_error(kind, path, unread, read):
    encode = load_text_encoder(path, kind=kind)
    with pytest.raises(ValueError, match=f"cannot read the prompt '{unread}': it reads"):
        encode.check(unread)
    encode.check(read)
    with pytest.raises(ValueError, match="is empty"):
        encode.check("  ")
    encode.check(encode.example)


def test_the_example_prompt_has_known_words():
    encode = load_text_encoder(MINI, kind="dalle-mini")
    for known, expected in (
        (KnownWords(frozenset({"cats", "dogs"}), ("cats and dogs",)), "cats and dogs"),
        (KnownWords(frozenset({"dogs", "cats"})), "cats"),
    ):
        encode.known_words = known
        assert encode.example == expected
        encode.check(encode.example)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'dalle-maxi'; expected one of dalle-pytorch, dalle-mini"):
        load_text_encoder(MINI, kind="dalle-maxi")
