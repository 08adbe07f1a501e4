"""The page in a real browser: it streams, compares, shows what is sent and what might have been said."""

import pytest
from serving import CALL, CALLER_ID, LAST_ID, LONG

TEXTS = "[...document.querySelectorAll('.text')].map(node => node.textContent)"
IDLE = "document.querySelector('#send').textContent === 'Send' && !document.querySelector('#send').disabled"


@pytest.fixture
def page(browser, web):
    """The page with answers of small letters."""
    browser.show(1000, 700)
    browser.open(web.url)
    browser.wait(IDLE)
    browser.evaluate(f"defaults.logit_bias = { ({token: 30 for token in range(97, 123)}) }")
    return browser


def say(page, text):
    page.type(text)
    page.press("Enter")
    page.wait(IDLE)


def fill(page, **fields):
    for name, value in fields.items():
        page.evaluate(f"document.querySelector('#{name}').value = {value!r}")


def test_a_message_is_answered_by_both_models_in_columns_as_text(page):
    # Nothing but <, > and b: whatever would be read as HTML would be seen to.
    page.evaluate("defaults.logit_bias = {60: 90, 62: 90, 98: 90}")
    fill(page, temperature="1", max_tokens="40")
    say(page, "<i>hi</i>")
    first, second = page.evaluate(TEXTS)
    assert len(first) == len(second) == 40 and set(first + second) == set("<>b")
    assert page.evaluate("document.querySelector('.said').textContent") == "<i>hi</i>"
    assert page.evaluate("document.querySelectorAll('#talk i, #talk b').length") == 0
    places = "[...document.querySelectorAll('.answer')].map(node => node.getBoundingClientRect().toJSON())"
    left, right = page.evaluate(places)
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    assert page.evaluate("document.activeElement.id") == "said"
    facts = page.evaluate("document.querySelector('.facts').textContent")
    assert facts.startswith("40 tokens, ") and "tokens/s" in facts and "cut at the longest" in facts


def test_an_answer_is_seen_while_it_comes_and_escape_ends_it(page):
    fill(page, max_tokens=str(LONG))
    page.type("hi")
    page.press("Enter")
    page.wait(f"{TEXTS}.every(text => text.length > 5)")
    assert page.evaluate("document.querySelector('#send').textContent") == "Stop"
    page.press("Escape")
    page.wait(IDLE)
    assert page.evaluate("document.querySelector('.facts').textContent").endswith("stopped")
    assert not any(page.evaluate(f"{TEXTS}.map(text => text.length >= {LONG})"))


def test_the_candidates_of_a_token_are_those_of_the_api(page, web):
    fill(page, temperature="0", system="", max_tokens="6")
    say(page, "hi")
    bias = page.evaluate("defaults.logit_bias")
    asked = {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 10, "logit_bias": bias}
    expected = web.chat(**asked).choices[0].logprobs.content
    page.click(".token:nth-child(2)")
    rows = "[...document.querySelectorAll('#candidates li')].map(row => row.innerText.split('\\n'))"
    chosen = "document.querySelectorAll('#candidates li[aria-current]').length"
    for place in (1, 2, 1):
        found = page.evaluate(rows)
        chances = [f"{100 * 2.718281828**one.logprob:.1f} %" for one in expected[place].top_logprobs]
        assert [row[-1] for row in found[:-1]] == chances and found[-1][0] == "anything else"
        assert page.evaluate(chosen) == 1
        assert page.evaluate("document.activeElement.token.number") == place
        page.press("ArrowRight" if page.evaluate("document.activeElement.token.number") == 1 else "ArrowLeft")
    page.press("Escape")
    assert page.evaluate("document.querySelector('#wanted').hidden && document.activeElement.id") == "said"


def test_what_is_sent_is_shown_with_all_that_was_said(page):
    fill(page, max_tokens="4", temperature="0", system="Be brief.")
    page.evaluate("document.querySelector('#said').focus()")
    say(page, "hi")
    answers = [text.strip() for text in page.evaluate(TEXTS)]
    page.click("#see")
    page.wait("document.querySelector('#context').open")
    first, second = page.evaluate(
        "[...document.querySelectorAll('#columns pre')].map(node => node.textContent)"
    )
    assert first == f"[s]Be brief.[u]hi[a]{answers[0]}[u]…[a]"
    assert second == f"Be brief.\nUser: hi\nAssistant: {answers[1]}\nUser: …\nAssistant:"
    assert page.evaluate("document.querySelector('#columns p').textContent").endswith(" of 4,096 tokens")


def test_a_mistake_is_shown_and_what_was_said_stands_again_to_be_sent(page):
    fill(page, top_p="3")
    say(page, "hi")
    assert "top_p is 3.0" in page.evaluate("document.querySelector('#error').textContent")
    assert page.evaluate("document.querySelector('#said').value") == "hi"
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    fill(page, top_p="1", max_tokens="2")
    page.press("Enter")
    page.wait("document.querySelectorAll('.facts').length === 2")
    page.wait(IDLE)
    assert page.evaluate("document.querySelector('#error').hidden")


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_both_colour_schemes(page, dark):
    page.show(360, 780, dark)
    fill(page, max_tokens="30")
    say(page, "a long word: " + "x" * 100)
    page.click(".token")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.answer')].map(node => node.getBoundingClientRect().x)"
    )
    assert boxes[0] == boxes[1]  # one under the other


def test_a_call_and_its_result_are_turns_of_their_own_which_the_next_message_sends_again(browser, calling):
    browser.show(1000, 700)
    browser.open(calling.url)
    browser.wait(IDLE)
    browser.evaluate(f"defaults.logit_bias = { {CALLER_ID: 900, LAST_ID: 500} }")
    say(browser, "What is 6 * 7?")
    parts = "[...document.querySelectorAll('.answer > div')].map(node => [node.className, node.textContent])"
    assert browser.evaluate(parts) == [["text called", CALL], ["result", "42"], ["text", "Z"]]
    assert browser.evaluate("document.querySelectorAll('.cut').length") == 0
    browser.click("#see")
    browser.wait("document.querySelector('#context').open")
    sent = browser.evaluate("document.querySelector('#columns pre').textContent")
    assert sent.startswith("[s]You can call a tool") and sent.endswith(f"[a]{CALL}[t]42[a]Z[u]…[a]")
