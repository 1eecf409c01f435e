"""Trains small tokenizers and writes them with the ids that the reference packages give.

    python tests/make_tokenizer_fixtures.py OUTDIR [--demo-model MODEL.gguf]

OUTDIR/NAME/tokenizer.json and OUTDIR/NAME.gguf (vocabulary only) hold one tokenizer each. OUTDIR/oracle.json lists, per file,
cases {text, ids, ids_with_special}: special tokens as plain text, and recognised. References: the packages `tokenizers` and
`sentencepiece`. The demo model's tokenizer is rebuilt from its GGUF metadata.
"""

import argparse
import io
import json
import pathlib

import gguf
import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2000

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# Mistral NeMo's tokenizer.json.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does with tokenizer.ggml.pre = default.
DEFAULT_PATTERNS = [r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"]

PROSE = """The lighthouse keeper's daughter couldn't believe it: after 37 years, the ship they'd been waiting for had arrived.
She'll write it down, she said, and I'm sure we've all heard the story; he'd tell it twice. In 1923, about 1,250 people
lived on the island. "What's the matter?" asked the old man. It's nothing, she answered -- nothing at all.
"""
MULTILINGUAL = """Der Übergang über die Brücke war gesperrt; naïve café-goers waited. Ωραία μέρα σήμερα. Привет, мир!
日本語の文章を書いています。今日は良い天気ですね。 中文分词测试:我们在图书馆看书。 한국어 문장입니다.
مرحبا بالعالم، هذا نص عربي. שלום עולם. हिन्दी में लिखा हुआ पाठ। ภาษาไทยไม่มีช่องว่าง
"""
SPECIALS = ["<|begin|>", "<|end|>", "<|end|>|"]

CASES = {
    "empty": "",
    "space": " ",
    "prose": PROSE,
    "multilingual": MULTILINGUAL,
    "contractions": "It's I'm we've they'll he'd DON'T CAN'T I'LL 's 'S '\u017f don''t",
    "numbers": "0 1 12 123 1234 12345 3.14159 1e-10 0xDEADBEEF ½ Ⅷ ٣٤٥ 100,000.00 v1.2.3",
    "whitespace_runs": "a  b   c    d\t\te\t f \n\n\ng\r\nh\r\n\r\n  i \n j\n  ",
    "leading_and_trailing": "   leading and trailing   ",
    "unicode_spaces": "no\u00a0break\u2003em\u3000ideographic\u2028line\u2029paragraph\u0085next\u200bzero",
    "only_newlines": "\n\n\n",
    "emoji": "family 👨‍👩‍👧‍👦 flag 🇪🇺 skin 👍🏽 heart ❤️ 🙂",
    "combining_marks": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 \u1112\u1161\u11ab \ufb01 \u212b",
    "right_to_left": "\u202bשלום\u202c (abc) مرحبا",
    "cpp": 'template <class T>\nstd::vector<T> f(const T* p, int n) {\n\tfor (int i = 0; i < n; ++i) x += p[i] << 2;\n\treturn {"a\\n"};\n}\n',
    "python": "def f(x: int = 3, *args, **kw) -> list[str]:\n    '''doc'''\n    return [f\"{y!r:>10}\" for y in range(x) if y % 2 == 0]\n",
    "specials": "<|begin|>system\nBe brief.<|end|>\n<|begin|> user  <|end|>| <|end|><|begin|",
    "marks_of_others": "<unk> <s> </s> <0x0A> ▁ ▁▁a Ġ Ċ ą",
    "controls": "bell\x07 escape\x1b[0m delete\x7f unit\x1f",
    "astral": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \U000e0001",
    "same_word_again": "again again Again again  again\nagain",
    "long_word": "antidisestablishmentarianism" * 8 + "=" * 100,
}


def corpus() -> list[str]:
    files = sorted(REPOSITORY.glob("*/*.h")) + sorted(REPOSITORY.glob("quant/*.cpp")) + [pathlib.Path(__file__)]
    return [PROSE, MULTILINGUAL] + [file.read_text(encoding="utf-8") for file in files]


def save(folder: pathlib.Path, name: str, tokenizer: Tokenizer) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / name / "tokenizer.json"))


def cases_of(tokenizer: Tokenizer, texts: dict[str, str]) -> list[dict]:
    """Expected ids from the `tokenizers` package."""
    cases = []
    for name, text in texts.items():
        ids = {}
        for key, as_text in (("ids", True), ("ids_with_special", False)):
            tokenizer.encode_special_tokens = as_text
            ids[key] = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"name": name, "text": text, **ids})
    return cases


def token_types(tokens: list[str], tokenizer: Tokenizer) -> list[int]:
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    types = []
    for token in tokens:
        if token in added:
            types.append(gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED)
        elif len(token) == 6 and token.startswith("<0x"):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    return types


class VocabularyFile:
    """A GGUF file with tokenizer metadata and one small tensor."""

    def __init__(self, path: pathlib.Path, model: str, tokens: list, types: list[int]):
        self.writer = gguf.GGUFWriter(str(path), "llama")
        self.writer.add_tokenizer_model(model)
        self.writer.add_token_list(tokens)
        self.writer.add_token_types(types)

    def close(self) -> None:
        self.writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def tokens_by_id(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]


def save_byte_bpe_gguf(path: pathlib.Path, tokenizer: Tokenizer, pre: str) -> None:
    tokens = tokens_by_id(tokenizer)
    file = VocabularyFile(path, "gpt2", tokens, token_types(tokens, tokenizer))
    file.writer.add_tokenizer_pre(pre)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    file.writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    file.close()


def byte_bpe(pre_tokenizer, normalizer=None, ignore_merges=False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    return tokenizer


def split_then_bytes(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_byte_bpe(folder: pathlib.Path, oracle: dict) -> None:
    bytes_by_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizers = {
        "gpt-2": byte_bpe(bytes_by_regex),
        "default": byte_bpe(split_then_bytes(*DEFAULT_PATTERNS)),
        "tekken": byte_bpe(split_then_bytes(TEKKEN_PATTERN), ignore_merges=True),
        "llama-bpe": byte_bpe(split_then_bytes(LLAMA3_PATTERN), ignore_merges=True),
        "qwen2": byte_bpe(split_then_bytes(QWEN2_PATTERN), normalizer=normalizers.NFC()),
        "smollm": byte_bpe(
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_by_regex])
        ),
    }
    for name, tokenizer in tokenizers.items():
        save(folder, name, tokenizer)
        save_byte_bpe_gguf(folder / f"{name}.gguf", tokenizer, name)
        oracle[name] = oracle[f"{name}.gguf"] = cases_of(tokenizer, CASES)


def train_sentencepiece(model_type: str, **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    lines = [line for text in corpus() for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=model_type,
        vocab_size=VOCAB_SIZE,
        character_coverage=0.99,
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_types(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    types = []
    for index in range(processor.vocab_size()):
        if processor.is_unknown(index):
            types.append(gguf.TokenType.UNKNOWN)
        elif processor.is_control(index):
            types.append(gguf.TokenType.CONTROL)
        elif processor.is_byte(index):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    return types


def save_sentencepiece_gguf(path, processor, model: str, remove_extra_whitespaces: bool) -> None:
    size = processor.vocab_size()
    tokens = [processor.id_to_piece(index) for index in range(size)]
    file = VocabularyFile(path, model, tokens, sentencepiece_types(processor))
    file.writer.add_token_scores([processor.get_score(index) for index in range(size)])
    file.writer.add_unk_token_id(processor.unk_id())
    file.writer.add_add_space_prefix(True)
    file.writer.add_remove_extra_whitespaces(remove_extra_whitespaces)
    file.close()


def plain_cases(processor: sentencepiece.SentencePieceProcessor) -> list[dict]:
    """Expected ids from the `sentencepiece` package, which never recognises control tokens."""
    return [{"name": name, "text": text, "ids": processor.encode(text)} for name, text in CASES.items()]


def bpe_of_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> models.BPE:
    """The same merges by rank: all pairs of tokens that join to a token, best score first."""
    vocab = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    normal = {piece: i for piece, i in vocab.items() if not (processor.is_control(i) or processor.is_byte(i))}
    merges = []
    for piece, index in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-processor.get_score(index), index, normal[left], left, right))
    return models.BPE(
        vocab,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


def make_sentencepiece(folder: pathlib.Path, oracle: dict) -> None:
    llama2 = train_sentencepiece("bpe", byte_fallback=True, remove_extra_whitespaces=False)
    save_sentencepiece_gguf(folder / "sentencepiece-bpe.gguf", llama2, "llama", False)
    oracle["sentencepiece-bpe.gguf"] = plain_cases(llama2)

    for name, metaspace in (("llama2-legacy", None), ("llama2-metaspace", "first")):
        tokenizer = Tokenizer(bpe_of_sentencepiece(llama2))
        if metaspace is None:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", *SPECIALS)])
        save(folder, name, tokenizer)
        oracle[name] = cases_of(tokenizer, CASES)

    for name, options in (
        ("sentencepiece-unigram", {"remove_extra_whitespaces": True}),
        ("sentencepiece-unigram-bytes", {"remove_extra_whitespaces": False, "byte_fallback": True}),
    ):
        unigram = train_sentencepiece("unigram", hard_vocab_limit=False, **options)
        save_sentencepiece_gguf(folder / f"{name}.gguf", unigram, "t5", options["remove_extra_whitespaces"])
        oracle[f"{name}.gguf"] = plain_cases(unigram)


def make_unigram(folder: pathlib.Path, oracle: dict) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    save(folder, "unigram", tokenizer)
    oracle["unigram"] = cases_of(tokenizer, CASES)


def make_steps(folder: pathlib.Path, oracle: dict) -> None:
    """Normalisers and pre-tokenizers that no family above uses, over characters and one byte-level vocabulary."""
    def characters(normalizer=None, pre_tokenizer=None) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<unk>", *SPECIALS], show_progress=False)
        tokenizer.train_from_iterator(corpus(), trainer)
        return tokenizer

    split = pre_tokenizers.Split
    steps = {
        "lower-nfd-strip": characters(
            normalizers.Sequence(
                [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents(), normalizers.Strip()]
            ),
            pre_tokenizers.WhitespaceSplit(),
        ),
        "nfkd-replace": characters(
            normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(Regex(r"\s+"), " ")]),
            pre_tokenizers.Punctuation("isolated"),
        ),
        "split-removed": characters(pre_tokenizer=split(Regex(r"\s+"), "removed")),
        "split-previous": characters(pre_tokenizer=split(" ", "merged_with_previous")),
        "split-next": characters(pre_tokenizer=split(" ", "merged_with_next")),
        "split-contiguous": characters(pre_tokenizer=split(Regex(r"[a-z]"), "contiguous")),
        "split-inverted": characters(pre_tokenizer=split(Regex(r"\p{L}+"), "removed", invert=True)),
        "digit-runs": characters(pre_tokenizer=pre_tokenizers.Digits(individual_digits=False)),
        "byte-prefix-space": byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)),
    }
    steps["split-next"].add_tokens([AddedToken("story", lstrip=True, rstrip=True, normalized=True)])
    for name, tokenizer in steps.items():
        save(folder, name, tokenizer)
        oracle[name] = cases_of(tokenizer, CASES)


def tokenizer_of_gguf(path: pathlib.Path) -> Tokenizer:
    """The demo model's tokenizer (byte-level BPE, single digits) from its metadata."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return tokenizer


def demo_cases(path: pathlib.Path) -> list[dict]:
    chat = "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    texts = {**CASES, "chat": chat}
    for file in (pathlib.Path("quant/codebook.h"), pathlib.Path("tests/make_tokenizer_fixtures.py")):
        texts[str(file)] = (REPOSITORY / file).read_text(encoding="utf-8")
    return cases_of(tokenizer_of_gguf(path), texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=pathlib.Path)
    parser.add_argument("--demo-model", type=pathlib.Path)
    arguments = parser.parse_args()
    folder = arguments.outdir
    folder.mkdir(parents=True, exist_ok=True)
    oracle: dict[str, list[dict]] = {}
    make_byte_bpe(folder, oracle)
    make_sentencepiece(folder, oracle)
    make_unigram(folder, oracle)
    make_steps(folder, oracle)
    if arguments.demo_model:
        oracle["demo-model"] = demo_cases(arguments.demo_model)
    (folder / "oracle.json").write_text(json.dumps(oracle, ensure_ascii=False), encoding="utf-8")
    print(f"{len(oracle)} tokenizers, {sum(map(len, oracle.values()))} cases in {folder}")


if __name__ == "__main__":
    main()
