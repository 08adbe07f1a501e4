"""Rules of form that a text follows or doesn't, in the manner of IFEval (arXiv:2311.07911): its 25 kinds.

They decide as its published code does, but for three that lean on libraries there: sentences are counted by
their punctuation, words in capitals by letters, and a language is known by its script or its commonest words.
A rule in a language that isn't known by either can't be checked, and its prompt is left out.
"""

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

# A language's share of letters in its script, or of words among its commonest.
SCRIPTS = {
    **dict.fromkeys(("ru", "bg", "uk", "mk"), "CYRILLIC"),
    **dict.fromkeys(("hi", "mr", "ne"), "DEVANAGARI"),
    **dict.fromkeys(("ar", "fa", "ur"), "ARABIC"),
    **{"ko": "HANGUL", "th": "THAI", "el": "GREEK", "he": "HEBREW", "bn": "BENGALI", "pa": "GURMUKHI"},
    **{"gu": "GUJARATI", "ta": "TAMIL", "te": "TELUGU", "kn": "KANNADA", "ml": "MALAYALAM", "zh": "CJK"},
}
WORDS = {
    "en": "the of and to in is that it for was with as his on be at by this had not are but from or have an",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le",
    "it": "di e il la che in a per un è del non sono le una si da con i della nel come più anche alla dei",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das",
    "vi": "và của là có không được cho trong một người với các những đã này khi đến để tôi cũng như từ vào",
    "sw": "ya na wa kwa ni katika za la kuwa cha hii hiyo kama lakini pia hivyo huo wake yake sana si au",
    "fi": "ja on ei se että oli hän joka mutta ovat kun myös niin tai kuin sen voi mukaan olla jos vain nyt",
    "nl": "de van het een en in is dat op te zijn voor met die niet aan er om ook als maar bij uit door naar",
}


def checkable(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether this house can tell; only of languages it may not."""
    language = settings.get("language")
    return name in RULES and (language is None or language in SCRIPTS or language in WORDS)


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a rule that isn't there, and for one without its settings or with wrong ones."""
    if name not in RULES:
        raise ValueError(f"no rule {name!r}")
    signature = inspect.signature(RULES[name])
    try:
        signature.bind("", **settings)
    except TypeError as error:
        raise ValueError(f"the rule {name}: {error}") from None
    for setting, value in settings.items():
        kind = signature.parameters[setting].annotation
        fits = {
            str: isinstance(value, str),
            int: isinstance(value, int | float) and not isinstance(value, bool),
            list[str]: isinstance(value, list) and all(isinstance(word, str) for word in value),
        }[kind]
        if not fits or (setting in _RELATIONS and value not in ("less than", "at least")):
            raise ValueError(f"the rule {name} with {setting}={value!r}")
        try:
            for pattern in ([value] if isinstance(value, str) else value) if setting in _PATTERNS else ():
                re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the rule {name} with {setting}={value!r}: {error}") from None


_RELATIONS = ("relation", "let_relation", "capital_relation")
_PATTERNS = ("keywords", "keyword", "forbidden_words", "section_spliter", "postscript_marker")


def follows(text: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether the text follows the rule; an empty one follows none."""
    return bool(text.strip()) and bool(RULES[name](text, **settings))


def compared(count: float, relation: str, wanted: float) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


# ---- words ----


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compared(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[^\W_][\w'\u2019-]*", text)
    return compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _language(text: str, language: str) -> bool:
    if script := SCRIPTS.get(language):
        letters = [sign for sign in text if sign.isalpha()]
        ours = sum(unicodedata.name(sign, "").startswith(script) for sign in letters)
        return ours > len(letters) / 2
    words = re.findall(r"[^\W\d_]+", text.lower())
    shares = {name: sum(word in common.split() for word in words) for name, common in WORDS.items()}
    return shares[language] > 0 and shares[language] == max(shares.values())


# ---- lengths ----


def _words(text: str, num_words: int, relation: str) -> bool:
    return compared(len(re.findall(r"\w+", text)), relation, num_words)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    """A sentence ends with its punctuation before a space, titles and initials apart."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z])\.", r"\1", text)
    found = [part for part in re.split(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+", text) if re.search(r"\w", part)]
    return compared(len(found), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by ***."""
    parts = _parts(re.split(r"\s?\*\*\*\s?", text))
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by an empty line."""
    parts = re.split(r"\n\n", text)
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not (part := parts[nth_paragraph - 1].strip()):
        return False
    word = re.match(r"[^.,?!'\"]*", part.split()[0].lstrip("'").lstrip('"'))[0].lower()
    return count == num_paragraphs and word == first_word.lower()


# ---- content and format ----


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(postscript_marker, postscript_marker.lower()), text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(one.strip("*").strip()) for one in (*single, *double)) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter}\s?\d+\s?", text)) >= num_sections


def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _json(text: str) -> bool:
    text = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _repeated(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _two_responses(text: str) -> bool:
    parts = _parts(text.split("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _parts(parts: list[str]) -> list[str] | None:
    """Those that aren't empty; None where an empty one stands between others."""
    if not all(part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_words": _words,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:title": _title,
    "detectable_format:json_format": _json,
    "detectable_format:constrained_response": _constrained,
    "combination:repeat_prompt": _repeated,
    "combination:two_responses": _two_responses,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "change_case:capital_word_frequency": _capital_words,
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:quotation": _quoted,
    "startend:end_checker": _ends,
}
