"""Written answers are judged by words, numbers, and rules of form."""

import pytest

from llm_jax.evaluation import checks
from llm_jax.evaluation.rules import RULES, checkable, follows

# A text that follows the rule, one that doesn't, and the rule's settings.
CASES = {
    "keywords:existence": ("Cats and Dogs", "cats only", {"keywords": ["cat", "dog"]}),
    "keywords:frequency": ("a b a", "a b", {"keyword": "a", "frequency": 2, "relation": "at least"}),
    "keywords:forbidden_words": ("a category", "A cat.", {"forbidden_words": ["cat"]}),
    "keywords:letter_frequency": (
        "Oh no",
        "ohoo",
        {"letter": "o", "let_frequency": 3, "let_relation": "less than"},
    ),
    "language:response_language": ("Привет, мир", "Hello, мир", {"language": "ru"}),
    "length_constraints:number_words": ("one two", "one", {"num_words": 2, "relation": "at least"}),
    "length_constraints:number_sentences": (
        "Dr. Who left. Why?",
        "It ended. Did it? Yes!",
        {"num_sentences": 3, "relation": "less than"},
    ),
    "length_constraints:number_paragraphs": ("a\n***\nb", "a\n\nb", {"num_paragraphs": 2}),
    "length_constraints:nth_paragraph_first_word": (
        'one\n\n"Two, b',
        "two\n\none",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
    ),
    "detectable_content:number_placeholders": ("[name] at [place]", "[name]", {"num_placeholders": 2}),
    "detectable_content:postscript": ("Bye.\nP. S. more", "Bye.\nPS more", {"postscript_marker": "P.S."}),
    "detectable_format:number_bullet_lists": ("* a\n- b", "* a\n- b\n- c", {"num_bullets": 2}),
    "detectable_format:number_highlighted_sections": ("*a* b *c*", "*a* b ** **", {"num_highlights": 2}),
    "detectable_format:multiple_sections": (
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1",
        {"section_spliter": "SECTION", "num_sections": 2},
    ),
    "detectable_format:title": ("<<Joy>>\nfull", "<<>> Joy", {}),
    "detectable_format:json_format": ('```json\n{"a": [1]}\n```', "{'a': 1}", {}),
    "detectable_format:constrained_response": ("My answer is maybe.", "My answer is perhaps.", {}),
    "combination:repeat_prompt": ("Say it. It.", "It. Say it.", {"prompt_to_repeat": "say it."}),
    "combination:two_responses": ("a\n******\nb", "a\n******\na", {}),
    "change_case:english_capital": ("ALL OF IT.", "All OF IT.", {}),
    "change_case:english_lowercase": ("all of it.", "All of it.", {}),
    "change_case:capital_word_frequency": (
        "NASA and ESA",
        "NASA and Esa",
        {"capital_frequency": 2, "capital_relation": "at least"},
    ),
    "punctuation:no_comma": ("no comma; none", "one, two", {}),
    "startend:quotation": (' "quoted" ', '"quoted', {}),
    "startend:end_checker": ("So it ends HERE.", "So it ends here. Not.", {"end_phrase": "ends here."}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_tells_who_follows_it(name):
    good, bad, settings = CASES[name]
    assert follows(good, name, settings) and not follows(bad, name, settings)
    assert not follows("  ", name, settings)


@pytest.mark.parametrize(
    "language, text",
    [
        ("vi", "Tôi không có nhiều thời gian và đây là một câu trả lời của người bạn."),
        ("sw", "Habari ya asubuhi, mimi ni mtoto wa shule na kwa sasa niko katika nyumba ya rafiki yangu."),
        ("ko", "오늘은 날씨가 좋습니다."),
        ("en", "This is the answer to the question that was asked of me."),
        ("de", "Das ist die Antwort auf die Frage, und sie ist nicht mit dem Rest zu verwechseln."),
    ],
)
def test_languages_are_known_apart(language, text):
    assert follows(text, "language:response_language", {"language": language})
    others = {"vi", "sw", "ko", "en", "de", "ru"} - {language}
    assert not any(follows(text, "language:response_language", {"language": other}) for other in others)


def test_a_prompt_with_a_rule_that_nobody_here_can_check_is_left_out():
    assert not checkable("language:response_language", {"language": "xx"})
    rules = [("punctuation:no_comma", {}), ("language:response_language", {"language": "xx"})]
    assert checks.CHECKS["rules"]("a", rules, "") == {}


@pytest.mark.parametrize(
    "name, settings, wrong",
    [
        ("startend:end_check", {}, "no rule"),
        ("startend:end_checker", {}, "missing a required argument: 'end_phrase'"),
        ("startend:end_checker", {"end_phrase": "a", "words": 1}, "unexpected keyword argument 'words'"),
        ("startend:end_checker", {"end_phrase": 3}, "end_phrase=3"),
        ("length_constraints:number_words", {"num_words": "2", "relation": "at least"}, "num_words='2'"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "over"}, "relation='over'"),
        ("keywords:existence", {"keywords": "cat"}, "keywords='cat'"),
        ("keywords:existence", {"keywords": ["a", "(b"]}, "missing \\), unterminated subpattern"),
        (["startend:quotation"], {}, "no rule with settings"),
        ("startend:quotation", [], "no rule with settings"),
    ],
)
def test_a_rule_that_could_not_be_judged_is_refused_when_it_is_read(name, settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        checks.rules_of({"instruction_id_list": [name], "kwargs": [settings]})


@pytest.mark.parametrize("name", RULES)
def test_a_rule_with_its_settings_is_read(name):
    settings = CASES[name][2]
    record = {"instruction_id_list": [name], "kwargs": [settings | {"other": None}]}
    assert checks.rules_of(record) == [(name, settings)]


@pytest.mark.parametrize(
    "text, repeated",
    [
        ("The cat sat. " * 4, True),
        ("The cat sat. " * 3, False),
        ("It is, it is, it is, it is, it is, it is", True),
        ("ha" * 20, True),
        ("." * 300, True),
        ("No, no, no, no!", False),
        ("The population is 1000000.", False),
        ("Hmm....", False),
        ("Wait!!!!!", False),
        ("def f(x):\n    if x:\n        return 1\n    ", False),
        ("I made 22222 of them", False),
        ("| a | b | c |\n| --- | --- | --- |", False),
    ],
)
def test_repetition_is_of_words_or_very_long(text, repeated):
    assert checks.repeats(text) is repeated


@pytest.mark.parametrize(
    "text, goes_on",
    [
        ("User: and now?", True),
        ("Yes.\nHuman: why?", True),
        ("Yes.\nuser\nWhy?", True),
        ("Yes.\n### Human:", True),
        ("Yes.\n**User:** why?", True),
        ("Yes.\nUser", True),
        ("Human.", False),
        ("human", False),
        ("- user\n- admin", False),
        ("Users\nare told.", False),
    ],
)
def test_somebody_else_s_turn_is_known_from_a_word(text, goes_on):
    assert checks.continues_as_user(text) is goes_on


def test_prompts_and_instructions_are_counted_strictly_and_loosely():
    rules = [("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "done."})]
    assert checks.CHECKS["rules"]("Sure, here:\nall is done.", rules, "") == {
        "accuracy": (0.0, 1.0),
        "accuracy_loose": (1.0, 1.0),  # without the first line
        "instructions": (1.0, 2.0),
        "instructions_loose": (2.0, 2.0),
    }


@pytest.mark.parametrize(
    "check, text, expected, pattern, right",
    [
        ("exact", "The Cat!\nmore", "cat", "", True),
        ("exact", "The cat sat", "cat", "", False),
        ("contains", "It was a cat, yes.", "the cat", "", True),
        ("contains", "a category", "cat", "", False),
        ("regex", "So the answer is (B).", "(B)", r"answer is (\([A-Z]\))", True),
        ("regex", "So it is (B).", "(B)", r"answer is (\([A-Z]\))", False),
        ("numeric", "2 and 3 are 1,005.0 apples.", "1005", "", True),
        ("numeric", "5 in 2 days\n#### 5\nor 6?", "6", "", True),
        ("numeric", "It is -4", "4", "", False),
        ("numeric", "The letter stands there twice.", "2", "", True),
        ("numeric", "One of them: 3", "1", "", False),
        ("numeric", "none", "0", "", False),
        ("exact", "-35", "35", "", False),
        ("exact", "It is \u221235!", "it is -35", "", True),
        ("exact", "3.5", "3 5", "", False),
        ("exact", "$1,005.", "1005", "", True),
        ("contains", "They met 2024-05-17.", "2024-05-17", "", True),
        ("contains", "It is -4 now", "4", "", False),
        ("numeric", "between 10-12", "12", "", True),
        ("numeric", "on 2024-05-17", "17", "", True),
        ("numeric", "GPT-4 says", "4", "", True),
        ("numeric", "It costs $.5", "0.5", "", True),
        ("numeric", "It is \u22127.", "-7", "", True),
        ("numeric", "It costs -$5", "-5", "", True),
        ("numeric", "3, -4.25", "-4.25", "", True),
        ("refusal", "I am sorry to hear that. Here is how it is done.", "unsafe", "", False),
        ("refusal", 'You could tell her "I am sorry, Anna."', "unsafe", "", False),
        ("refusal", "I apologize for the delay, but I cannot do that.", "unsafe", "", True),
        ("refusal", "Sorry, no.", "unsafe", "", True),
        ("refusal", "I\u2019m sorry, but no.", "unsafe", "", True),
        ("refusal", "Sure: press ctrl-C.", "safe", "", True),
        ("refusal", "I cannot help with that.", "safe", "", False),
    ],
)
def test_answers_are_judged(check, text, expected, pattern, right):
    assert checks.CHECKS[check](text, expected, pattern)["accuracy"] == (float(right), 1.0)
