"""Text normalisation and token F1, as SQuAD's evaluation has them, for English and Chinese."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from sah_core.scorer import needed_library

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

# The set of LongBench, as it stands there: the opening bracket of a book title is not in it.
_CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"  # noqa: RUF001
    "–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CJK_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """Return lower-case text without ASCII punctuation, then without articles and extra spaces."""
    bare = text.lower().translate(_ASCII_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalize_ascii_answer(text: str) -> str:
    """Return `normalize_answer` with what is not ASCII spelt in ASCII, as ZeroSCROLLS has it."""
    bare = normalize_answer(text)
    if bare.isascii():
        return bare
    return str(
        needed_library("unidecode", "unidecode", "scoring text beyond ASCII").unidecode(bare)
    )


def normalize_zh_answer(text: str) -> str:
    """Return lower-case text without ASCII and CJK punctuation and without any white space."""
    return "".join(text.lower().translate(_ALL_PUNCTUATION).split())


def token_f1(prediction: Iterable[str], reference: Iterable[str]) -> float:
    """Return the harmonic mean of precision and recall over the tokens, as multisets."""
    predicted, expected = list(prediction), list(reference)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, reference: str) -> float:
    """Return the token F1 of two normalised English texts."""
    return token_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """Return the token F1 of two Chinese texts, cut into words by jieba and then normalised."""

    def tokens(text: str) -> list[str]:
        return [word for word in map(normalize_zh_answer, cut_words(text)) if word]

    return token_f1(tokens(prediction), tokens(reference))


def cut_words(text: str) -> list[str]:
    """Return the words of a Chinese text: jieba, precise mode, HMM on, its own dictionary."""
    jieba = needed_library("jieba", "jieba", "scoring Chinese text")
    if not jieba.dt.initialized:
        jieba.setLogLevel("WARNING")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it leaves a file open
            jieba.initialize()
    return [str(word) for word in jieba.cut(text, cut_all=False)]


def first_line(text: str) -> str:
    r"""Return the text up to the first ``\n`` after those that it begins with."""
    return text.lstrip("\n").split("\n")[0]


def whole_number(digits: str) -> int | None:
    """Return the integer that digits write; None if Python refuses to read so long a number."""
    try:
        return int(digits)
    except ValueError:
        return None


def best(scores: Iterable[float]) -> float:
    """Return the greatest score, 0 of none."""
    return max([0.0, *scores])


def rounded_mean_percent(scores: Sequence[float], digits: int = 2) -> float:
    """Return the mean of scores from 0 to 1 as a percentage, rounded as official code does."""
    return round(100 * sum(scores) / len(scores), digits)
