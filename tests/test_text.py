"""Text encoding and decoding equal the originals for every kind of tokenizer file; errors of damaged files."""

import base64
import json
import pickle
import random
import time
from pathlib import Path

import pytest
import torch

from dall3.text import TextEncoder, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
MODEL = GOLDEN / "bpe.model"
YTTM = json.loads((GOLDEN / "yttm.json").read_text(encoding="utf-8"))
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "一", "只", "猫", "cube", "##s", "cafe", "café", ","]


@pytest.fixture(scope="module")
def yttm() -> Tokenizer:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture
def bert_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT_TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def hug_file(tmp_path: Path) -> Path:
    """A byte-level BPE that puts [CLS] and [SEP] around a text, as many published files do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a cube made of cloud", "a girl with thick glasses"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    path = tmp_path / "hug.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("case", YTTM["cases"], ids=lambda case: repr(case["text"][:20]))
def test_yttm_equals_youtokentome(yttm: Tokenizer, case: dict) -> None:
    assert yttm.encode(case["text"]) == case["ids"]
    assert yttm.decode(case["ids"]) == case["decoded"]


def test_yttm_vocabulary_equals_youtokentome(yttm: Tokenizer) -> None:
    assert yttm.vocab_size == YTTM["vocab_size"]
    assert [yttm.names[i] for i in range(yttm.vocab_size)] == YTTM["vocab"]


def test_yttm_special_ids_come_from_the_last_line(tmp_path: Path) -> None:
    # "▁ab", merged from its left, and the special ids unk 5, pad 0, no bos, eos 6.
    path = tmp_path / "small.model"
    path.write_text("3 2\n9601 1\n97 2\n98 3\n1 2 4\n4 3 7\n5 0 -1 6")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("ab a??b") == [7, 4, 5, 3]
    assert tokenizer.decode([0, 7, 4, 5, 3, 6]) == "ab a<UNK>b<EOS>"


def encode_naively(text: str) -> list[int]:
    """youtokentome's algorithm in its simplest form: repeatedly apply the first applicable merge at its first place."""
    lines = [list(map(int, line.split())) for line in MODEL.read_text().splitlines()]
    num_characters, num_merges = lines[0]
    ids = {chr(code): i for code, i in lines[1 : 1 + num_characters]}
    rules = {(x, y): (rank, z) for rank, (x, y, z) in enumerate(lines[1 + num_characters : -1])}
    assert len(rules) == num_merges

    for space in "\t\n\v\f\r▁":
        text = text.replace(space, " ")
    found = []
    for word in filter(None, text.split(" ")):
        tokens = [ids["▁"]]
        for i, character in enumerate(word):
            if character in ids:
                tokens.append(ids[character])
            elif i == 0 or word[i - 1] in ids:
                tokens.append(-1)
        while True:
            pairs = [(*rules[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:], strict=False)) if pair in rules]
            if not pairs:
                break
            _, merged, i = min(pairs, key=lambda found: (found[0], found[2]))
            tokens[i : i + 2] = [merged]
        found += [lines[-1][0] if token == -1 else token for token in tokens]
    return found


def test_yttm_equals_a_naive_youtokentome_on_random_text(yttm: Tokenizer) -> None:
    rng = random.Random(0)
    alphabet = [name for name in YTTM["vocab"][4:] if len(name) == 1]
    unknown = list("ABß日😀!<>\u00a0\u0085\u3000\u200b\x1c\x00")
    pieces = YTTM["vocab"][4:] + alphabet + unknown + list(" \t\n\v\f\r▁") * 3 + ["<UNK>", "<PAD>"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) * rng.choice([1, 1, 1, 2, 7]) for _ in range(rng.randrange(30)))
        assert yttm.encode(text) == encode_naively(text), repr(text)


def test_yttm_unknown_spaces_do_not_split_words(yttm: Tokenizer) -> None:
    # C's isspace knows only ASCII: U+00A0 is one more unknown character, where str.split would begin a word.
    assert yttm.encode("a\u00a0\u3000cube") == yttm.encode("aÉcube") != yttm.encode("a cube")


def test_yttm_encodes_a_long_word(yttm: Tokenizer) -> None:
    start = time.perf_counter()
    assert yttm.encode("cube" * 5000) == [98] + [12, 18, 22, 5] * 4999
    assert yttm.encode("日" * 20000) == [4, 1]
    assert time.perf_counter() - start < 2


def test_hug_gives_the_ids_of_the_original(hug_file: Path) -> None:
    from tokenizers import Tokenizer as HugTokenizer
    from tokenizers.processors import ByteLevel

    original = HugTokenizer.from_file(str(hug_file))
    assert original.encode("a cube").tokens[0] == "[CLS]"
    original.post_processor = ByteLevel(trim_offsets=True)

    tokenizer = load_tokenizer(hug_file)
    assert tokenizer.vocab_size == original.get_vocab_size()
    for text in ["a cube made of cloud", "  two   spaces ", "naïve 日本語 😀", "a\tb\n"]:
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids
        assert tokenizer.decode([0, *ids, 0, 0]) == original.decode(ids) == f" {text}".replace("   two", "  two")


def test_bert_splits_chinese_and_keeps_accents(bert_file: Path) -> None:
    tokenizer = load_tokenizer(bert_file)
    assert tokenizer.vocab_size == len(BERT_TOKENS)
    assert tokenizer.encode("一只猫,cubes") == [5, 6, 7, 12, 8, 9]
    assert tokenizer.encode("cafe café zebra") == [10, 11, 1]
    assert tokenizer.decode([5, 6, 7, 8, 9, 0, 0]) == "一 只 猫 cubes"


def test_clip_equals_open_clip_without_start_and_end(clip: Tokenizer) -> None:
    import open_clip

    assert clip.vocab_size == 49408
    assert clip.encode("a cat") == [320, 2368]
    for text in ["A Cube  made of\ncloud", "naïve café 日本語 😀", "don't &amp; won't"]:
        row = open_clip.tokenize(text)[0].tolist()
        assert clip.encode(text) == row[1 : row.index(49407)]
    assert clip.encode("") == []


def test_clip_decodes_without_start_end_and_padding(clip: Tokenizer) -> None:
    assert clip.decode(torch.tensor([49406, 320, 2368, 49407, 0, 0])) == "a cat"
    # 40407 is a word that DALLE-pytorch skips by mistake instead of 49407.
    assert clip.encode(clip.decode([320, 40407])) == [320, 40407]


@pytest.mark.parametrize("kind", ["yttm", "clip", "hug_file", "bert_file"])
def test_every_kind_decodes_tensors_refuses_foreign_ids_and_pickles(kind: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(found) if isinstance(found, Path) else found
    ids = tokenizer.encode("cube")
    assert tokenizer.decode(torch.tensor([*ids, 0])).strip() == "cube"
    for foreign in [-1, tokenizer.vocab_size]:
        with pytest.raises(ValueError, match=f"{foreign}.*tokenizer"):
            tokenizer.decode([*ids, foreign])
    assert pickle.loads(pickle.dumps(tokenizer)).encode("cube") == ids


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"PK\x03\x04\x80\x02weights", "can't decode"),
        (b"A cube made of cloud\n", "unknown format"),
        (b"<!doctype html>\n", "unknown format"),
        (MODEL.read_bytes()[:700], "23 characters and 148 merges"),
        (MODEL.read_bytes()[:9], "not enough values"),
        (MODEL.read_bytes().replace(b"173 172 174", b"173 999 174"), "999"),
        (MODEL.read_bytes().replace(b"173 172 174", b"38 29 174"), "not distinct"),
        (MODEL.read_bytes().replace(b"9601", b"9602"), "word mark"),
        (b'{"version": "1.0", "model": {"type": "B', "Unterminated"),
        (b'{"hidden_size": 768}', "its model is not an object"),
        (b"[PAD]\n[UNK]\ncube\n", "sep_token"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert str(path) in message and "expected the youtokentome, tokenizers JSON or BERT vocab.txt" in message
    assert "\n" not in message


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.model is not a file; expected"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(IsADirectoryError, match="is not a file; expected"):
        load_tokenizer(str(tmp_path))


def test_prompt_is_lower_cased_and_padded(yttm: Tokenizer) -> None:
    ids = TextEncoder(yttm, text_seq_len=6, num_text_tokens=175)("A CUBE of cloud")
    expected = [*yttm.encode("a cube of cloud"), 0, 0]
    assert ids.dtype == torch.int64 and ids.tolist() == expected[:6] and len(expected) == 6


def test_long_prompt_is_refused_or_cut(yttm: Tokenizer) -> None:
    prompt = YTTM["cases"][0]["text"]
    with pytest.raises(ValueError, match="has 13 tokens; expected at most 12.*truncate=True"):
        TextEncoder(yttm, 12, 175)(prompt)
    assert TextEncoder(yttm, 12, 175)(prompt, truncate=True).tolist() == YTTM["cases"][0]["ids"][:12]
    assert TextEncoder(yttm, 13, 175)(prompt).tolist() == YTTM["cases"][0]["ids"]


@pytest.mark.parametrize("prompt", ["", " \n\t", "▁▁"])
def test_prompt_without_tokens_is_refused(yttm: Tokenizer, prompt: str) -> None:
    with pytest.raises(ValueError, match="is empty"):
        TextEncoder(yttm, 8, 175)(prompt)


def test_blank_prompt_is_refused_where_spaces_are_tokens(hug_file: Path) -> None:
    tokenizer = load_tokenizer(hug_file)
    assert tokenizer.encode("  ")
    with pytest.raises(ValueError, match="is empty"):
        TextEncoder(tokenizer, 8, 300)("  ")


def test_prompt_must_be_a_str(yttm: Tokenizer) -> None:
    with pytest.raises(TypeError, match="is a list; expected a str"):
        TextEncoder(yttm, 8, 175)(["a cube"])


def test_tokenizer_of_another_transformer_is_refused_at_the_first_foreign_id(yttm: Tokenizer) -> None:
    encode = TextEncoder(yttm, 8, num_text_tokens=98)
    assert encode("a").tolist() == [37] + [0] * 7
    with pytest.raises(ValueError, match="id 98; the transformer has ids 0 to 97.*tokenizer"):
        encode("a cube")


def test_decode_skips_both_kinds_of_padding(yttm: Tokenizer) -> None:
    encode = TextEncoder(yttm, text_seq_len=6, num_text_tokens=175)
    ids = encode("a cube of cloud")
    padded = torch.where(ids == 0, 175 + torch.arange(6), ids)
    assert encode.decode(ids) == encode.decode(padded) == encode.decode(padded.tolist()) == "a cube of cloud"


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
NOTHING = {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "a"}
HIDDEN = {"type": "Sequence", "normalizers": [], "pretokenizers": [{"type": "FixedLength", "length": 0}]}
SELF = "\n".join(["1 40", "97 4", *(f"{4 + i} {4 + i} {5 + i}" for i in range(40)), "1 0 2 3"])


@pytest.mark.parametrize(
    ("text", "words"),
    (
        (json.dumps({"model": BPE | {"continuing_subword_prefix": "x"}}), "continuing_subword_prefix"),
        (json.dumps({"model": BPE, "normalizer": {"type": "Precompiled"}}), "Precompiled"),
        (json.dumps({"model": BPE, "normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}}), "64 times"),
        (json.dumps({"model": BPE, "pre_tokenizer": {"type": "FixedLength", "length": 0}}), "FixedLength"),
        (json.dumps({"model": BPE, "pre_tokenizer": HIDDEN}), "FixedLength"),
        (json.dumps({"model": BPE, "normalizer": {"type": "Sequence", "normalizers": [NOTHING] * 7}}), "64 times"),
        (
            json.dumps({"model": BPE, "normalizer": {"type": "Prepend", "prepend": "a" * 99, "content": "x"}}),
            "64 times",
        ),
        (json.dumps({"model": {"type": "Unknown"}}), "its model is a Unknown"),
        (json.dumps({"model": 3}), "its model is not an object"),
        (json.dumps({"model": BPE | {"merges": ["a q"]}}), "damaged or not a tokenizer"),
        ("{" * 100_000, "damaged or not a tokenizer"),
        (SELF, "more than 1000 characters"),
    ),
)
def test_hostile_tokenizer_files(tmp_path, text, words):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def precompiled(replacement: bytes) -> str:
    """A tokenizer with sentencepiece's replacement table, as in XLM-R; no text matches its entry."""
    table = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + replacement + b"\0").decode()
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    vocabulary = [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["▁cube", -2.0]]
    normalizers = [
        {"type": "Precompiled", "precompiled_charsmap": table},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    return json.dumps(
        {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
            "decoder": spaces,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary},
        }
    )


def test_a_tokenizer_with_sentencepieces_table_and_a_byte_order_mark(tmp_path):
    (tmp_path / "tokenizer.json").write_text(precompiled(b"fi"), encoding="utf-8-sig")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a  cube") == [4, 5] and tokenizer.decode([4, 5]) == "a cube"
    (tmp_path / "tokenizer.json").write_text(precompiled(b"x" * 65))
    with pytest.raises(ValueError, match="a text more than 64 times as long"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_padding_and_truncation_of_a_json_are_left_out(tmp_path):
    plain = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    plain |= {"model": BPE, "post_processor": None}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    padding["pad_to_multiple_of"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain | {"padding": padding, "truncation": cut}))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("abab") == [2, 2]


def test_a_word_that_a_tokenizer_cannot_encode_is_a_value_error(tmp_path):
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    text = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text | {"model": words}))
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text"):
        load_tokenizer(tmp_path / "tokenizer.json").encode("zebra")
