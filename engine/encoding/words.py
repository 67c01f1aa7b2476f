"""Text to words for the lexical encoder: Unicode folding, splitting, English stemming. No weights, no vectors.

Called by hashing.py only. The same text gives the same words on every machine; a Python release with a newer Unicode table may
fold characters that the older one did not know.
"""

from __future__ import annotations

import re
import unicodedata

# A word is a run of letters and digits; an apostrophe inside it does not end it (don't, bee's).
_WORD = re.compile(r"[^\W_]+(?:['’ʼ][^\W_]+)*")
_APOSTROPHE = re.compile(r"['’ʼ]")
_COMBINING = re.compile("[\u0300-\u036f]")
# Han, kana: scripts written without spaces, where a run of letters is a phrase and not a word.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_STEMMABLE = re.compile("[a-z]{3,40}")

MAX_WORD_CHARS = 64
"""Longer runs (encoded binaries, hashes) are cut: their heads still match each other."""


def words(text: str) -> list[str]:
    """The words of a text in order, folded: compatibility forms, case and Latin/Greek/Cyrillic accents are removed.

    `Bees' Café №5` gives bees, cafe, no5. Runs of Han or kana give overlapping pairs of characters. Cost: about 1 us a word.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", _COMBINING.sub("", unicodedata.normalize("NFKD", text)))
    found: list[str] = []
    for run in _WORD.findall(text.casefold()):
        if not run.isascii():
            if _UNSPACED.search(run):
                found.extend(run[i : i + 2] for i in range(max(len(run) - 1, 1)))
                continue
            run = _without_apostrophes(run)
        elif "'" in run:
            run = _without_apostrophes(run)
        found.append(run[:MAX_WORD_CHARS])
    return found


def _without_apostrophes(run: str) -> str:
    """`bee's` is bee; `don't` is dont; `o'clock` is oclock."""
    parts = _APOSTROPHE.split(run)
    if len(parts) > 1 and parts[-1] == "s":
        parts.pop()
    return "".join(parts)


# Porter's algorithm: c is a consonant, v a vowel; `y` after a consonant is a vowel. The stem's measure is its number of vc pairs.
_CONSONANT = "[^aeiou]"
_VOWEL = "[aeiouy]"
_CONSONANTS = _CONSONANT + "[^aeiouy]*"
_VOWELS = _VOWEL + "[aeiou]*"
_MEASURE_ABOVE_0 = re.compile(f"^(?:{_CONSONANTS})?{_VOWELS}{_CONSONANTS}")
_MEASURE_IS_1 = re.compile(f"^(?:{_CONSONANTS})?{_VOWELS}{_CONSONANTS}(?:{_VOWELS})?$")
_MEASURE_ABOVE_1 = re.compile(f"^(?:{_CONSONANTS})?(?:{_VOWELS}{_CONSONANTS}){{2}}")
_HAS_VOWEL = re.compile(f"^(?:{_CONSONANTS})?{_VOWEL}")
_DOUBLED = re.compile(r"([^aeiouylsz])\1$")
_SHORT = re.compile(f"^{_CONSONANTS}{_VOWEL}[^aeiouwxy]$")

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al", "entli": "ent",
    "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful",
    "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "logi": "log",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous", "ive", "ize", "al", "er", "ic", "ou",
)  # fmt: skip
_LONGEST_FIRST_2 = sorted(_STEP_2.items(), key=lambda rule: -len(rule[0]))
_LONGEST_FIRST_3 = sorted(_STEP_3.items(), key=lambda rule: -len(rule[0]))


def stem(word: str) -> str:
    """The stem of a lower-case English word by Porter's rules; words with other letters or digits are returned as they are.

    `connected`, `connections` and `connecting` give connect. Cost: about 10 us, so callers remember the answer.
    Source: Porter 1980, An algorithm for suffix stripping; with the two later amendments of its author (bli, logi).
    """
    if not _STEMMABLE.fullmatch(word):
        return word
    first = word[0]
    if first == "y":  # a leading y is a consonant; hidden behind a capital it is none of the vowels below
        word = "Y" + word[1:]
    word = _plural(word)
    word = _past_and_gerund(word)
    if word[-1] == "y" and _HAS_VOWEL.match(word[:-1]):
        word = word[:-1] + "i"
    word = _replace_suffix(word, _LONGEST_FIRST_2)
    word = _replace_suffix(word, _LONGEST_FIRST_3)
    word = _drop_suffix(word)
    return _final_letters(word).lower()


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def _past_and_gerund(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _MEASURE_ABOVE_0.match(word[:-3]) else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            head = word[: -len(suffix)]
            return _restore_e(head) if _HAS_VOWEL.match(head) else word
    return word


def _restore_e(head: str) -> str:
    """After -ed or -ing went: hop(p), siz(e), fil(e)."""
    if head.endswith(("at", "bl", "iz")):
        return head + "e"
    if _DOUBLED.search(head):
        return head[:-1]
    return head + "e" if _SHORT.match(head) else head


def _replace_suffix(word: str, rules: list[tuple[str, str]]) -> str:
    for suffix, other in rules:
        if word.endswith(suffix):
            head = word[: -len(suffix)]
            return head + other if _MEASURE_ABOVE_0.match(head) else word
    return word


def _drop_suffix(word: str) -> str:
    if word.endswith("ion"):
        head = word[:-3]
        return head if head.endswith(("s", "t")) and _MEASURE_ABOVE_1.match(head) else word
    for suffix in _STEP_4:
        if word.endswith(suffix):
            head = word[: -len(suffix)]
            return head if _MEASURE_ABOVE_1.match(head) else word
    return word


def _final_letters(word: str) -> str:
    if word.endswith("e"):
        head = word[:-1]
        if _MEASURE_ABOVE_1.match(head) or (_MEASURE_IS_1.match(head) and not _SHORT.match(head)):
            word = head
    if word.endswith("ll") and _MEASURE_ABOVE_1.match(word):
        word = word[:-1]
    return word
