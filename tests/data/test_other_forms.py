"""Forms in other columns say the same, and what cannot be read says which forms there are."""

import json
from pathlib import Path

import pytest

from poise.data.preferences import preferences_of, prompt_of, read_preferences, read_prompts, read_samples
from poise.data.rows import Understood
from poise.data.types import Preference
from poise.errors import PoiseError


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [
        ("a", "Yes."),
        ("model_b", "No."),
        ("response_a", "Yes."),
        (2, "No."),
        (1.0, "Yes."),
        ("B", "No."),
        ("tie", ""),
        ("tie (bothbad)", ""),
        ("both_bad", ""),
    ],
)
def test_a_winner_of_two_responses_makes_a_pair(winner: object, chosen: str) -> None:
    row = {"prompt": "Tea?", "response_a": "Yes.", "response_b": "No.", "winner": winner}
    rejected = {"Yes.": "No.", "No.": "Yes."}.get(chosen)
    assert preferences_of(row) == ([Preference("Tea?", chosen, rejected)] if rejected else [])


def test_conversations_with_a_winner_make_pairs() -> None:
    first, second = (
        [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")
    )
    [found] = preferences_of({"conversation_a": first, "conversation_b": second, "winner": "model_b"})
    assert (found.prompt, found.chosen, found.rejected) == ([first[0]], "No.", "Yes.")


def test_refusals_say_which_forms_there_are() -> None:
    with pytest.raises(ValueError, match="'winner' is 'me'; response_a, response_b or tie was expected"):
        preferences_of({"prompt": "x", "response_a": "a", "response_b": "b", "winner": "me"})
    with pytest.raises(ValueError, match="no two responses to choose from"):
        preferences_of({"prompt": "x", "winner": "a"})
    with pytest.raises(ValueError, match=r"but 'prompt', 'good', 'bad'; a row of preferences has prompt, chosen"):
        preferences_of({"prompt": "x", "good": "a", "bad": "b"})


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_to_train_on_serve_as_prompts(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
    rows = (
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
        {"chosen": [user, answer], "rejected": [user, answer | {"content": "No."}]},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}]},
        {"messages": [user]},
        {"prompt": "Tea?", "response_a": "Yes.", "response_b": "No.", "winner": "a"},
    )
    assert read_prompts(write(tmp_path / "rows.jsonl", *rows)) == ["Tea?", [user], [user], [user], [user], "Tea?"]


def test_several_completions_of_a_row_are_read(tmp_path: Path) -> None:
    rows = ({"prompt": "x", "completions": ["a", "b"]}, {"prompt": "y", "completion": "c"})
    found = read_samples(write(tmp_path / "rows.jsonl", *rows))
    assert [(one.prompt, one.completion) for one in found] == [("x", "a"), ("x", "b"), ("y", "c")]
    with pytest.raises(PoiseError, match=":1: the list of completions is empty"):
        read_samples(write(tmp_path / "empty.jsonl", {"prompt": "x", "completions": []}))


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
# Rows of published data sets, with the columns they have there; each says that "Yes." is better than "No.".
PUBLISHED: dict[str, dict] = {
    "openbmb/UltraFeedback": {
        "source": "x", "instruction": "Tea?", "correct_answers": ["None"], "completions": [
            {"model": "m", "response": "No.", "overall_score": 2, "fine-grained_score": 9.0, "annotations": {}},
            {"model": "n", "response": "Yes.", "overall_score": 8.5, "fine-grained_score": 1.0, "annotations": {}},
        ],
    },
    "argilla/ultrafeedback-binarized": {
        "instruction": "Tea?", "chosen_response": "Yes.", "rejected_response": "No.", "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 1.5,
    },
    "argilla/ultrafeedback-binarized-preferences-cleaned": {
        "prompt": "Tea?", "chosen": talk("Yes."), "chosen-rating": 5.0, "rejected": talk("No."), "rejected-rating": 1.0,
    },
    "argilla/distilabel-intel-orca": {
        "system": "", "input": "Tea?", "chosen": "Yes.", "rejected": "No.", "generations": ["Yes.", "No."],
        "rating": [9.0, 1.0], "order": ["x", "y"], "status": "unchanged", "chosen_score": 9.0,
    },
    "distilabel": {"instruction": "Tea?", "generations": ["Yes.", "No."], "ratings": [5, 1]},
    "nvidia/HelpSteer2 preference": {
        "prompt": "Tea?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 2, "split": "train",
    },
    "nvidia/HelpSteer3": {
        "domain": "general", "context": talk("Hm?")[:1], "response1": "Yes.", "response2": "No.",
        "overall_preference": -1, "individual_preference": [{"score": -1}],
    },
    "PKU-Alignment/PKU-SafeRLHF": {
        "prompt": "Tea?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1, "safer_response_id": 0,
    },
    "lmsys/chatbot_arena_conversations": {
        "model_a": "x", "model_b": "y", "winner": "model_b", "conversation_a": talk("No."),
        "conversation_b": talk("Yes."), "turn": 1,
    },
    "berkeley-nest/Nectar": {
        "prompt": "\n\nHuman: Tea?\n\nAssistant: ", "num_responses": 2,
        "answers": [{"answer": "Yes.", "model": "x", "rank": 1.0}, {"answer": "No.", "model": "y", "rank": 2.0}],
    },
    "stanfordnlp/SHP": {
        "history": "Tea?", "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0, "score_A": 2, "score_B": 9,
        "score_ratio": 4.5, "domain": "askculinary_train",
    },
    "lmsys/lmsys-arena (Kaggle)": {
        "id": 3, "model_a": "x", "model_b": "y", "prompt": '["Tea?"]', "response_a": '["No."]',
        "response_b": '["Yes."]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
    },
    "Kaggle's, as CSV, two turns": {
        "prompt": '["Hm?","Tea?"]', "response_a": '["So?","Yes."]', "response_b": '["So?","No."]',
        "winner_model_a": "1", "winner_model_b": "0", "winner_tie": "0",
    },
    "a winner by its model's name": {
        "prompt": "Tea?", "model_a": "x", "model_b": "b", "response_a": "No.", "response_b": "Yes.", "winner": "b",
    },
    "openai/webgpt_comparisons": {
        "question": {"dataset": "eli5", "id": "q", "full_text": "Tea?"}, "quotes_0": {"title": [], "extract": []},
        "answer_0": "No.", "tokens_0": {"prefix": [1]}, "score_0": -1.0, "answer_1": "Yes.", "score_1": 1.0,
    },
    "OpenAI preference fine-tuning": {
        "input": {"messages": talk("Hm?")[:1], "tools": [], "parallel_tool_calls": True},
        "preferred_output": talk("Yes.")[1:], "non_preferred_output": talk("No.")[1:],
    },
    "tatsu-lab/alpaca_farm": {
        "instruction": "Tea?", "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 2,
    },
    "lmarena-ai/arena-human-preference-140k": {
        "winner": "model_a", "conversation_a": [
            turn | {"content": [{"type": "text", "text": turn["content"], "image": None, "mimeType": None}]}
            for turn in talk("Yes.")
        ], "conversation_b": talk("No."),
    },
    "ms-swift": {"messages": [SYSTEM, *talk("Yes.")], "rejected_response": "No."},
    "ms-swift, two conversations": {"messages": talk("Yes."), "rejected_messages": talk("No.")},
    "ms-swift, ShareGPT turns": {
        "messages": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}], "rejected_response": "No.",
    },
    "ms-swift, older": {
        "query": "Tea?", "response": "Yes.", "rejected_response": "No.", "history": [["Hm?", "So?"]],
    },
    "LLaMA-Factory": {
        "instruction": "Tea?", "input": "", "chosen": "Yes.", "rejected": "No.", "history": [["Hm?", "So?"]],
    },
    "LLaMA-Factory, renamed": {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "history": talk("So?")},
    "lvwerra/stack-exchange-paired": {
        "qid": 1, "question": "Tea?", "date": "2011", "metadata": ["x"], "response_j": "Yes.", "response_k": "No.",
    },
    "HuggingFaceH4/stack-exchange-preferences": {
        "qid": 1, "question": "Tea?", "answers": [
            {"answer_id": 1, "pm_score": 0, "selected": False, "text": "No."},
            {"answer_id": 2, "pm_score": 3, "selected": True, "text": "Yes."},
        ],
    },
    "scores as text": {"prompt": "Tea?", "responses": '["No.", "Yes."]', "scores": "[-1, 0.5]"},
    "scores and ranks": {"prompt": "Tea?", "completions": ["No.", "Yes."], "scores": [1, 2], "ranks": [2, 1]},
    "capitals": {"prompt": "Tea?", "response_A": "Yes.", "response_B": "No.", "winner": "A"},
    "a pair beside its list": {
        "prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "responses": ["No.", "Yes."], "ratings": [1, 5],
    },
    "a winner beside its votes": {
        "prompt": "Tea?", "response_1": "Yes.", "response_2": "No.", "annotators": [1], "winner": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_published_data_sets_are_read(name: str) -> None:
    found = preferences_of(PUBLISHED[name])
    assert isinstance(found, list)
    [pair] = found
    asked = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
    assert (asked, pair.chosen, pair.rejected, pair.margin) == ("Tea?", "Yes.", "No.", 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "Yes.", "rejected": "No.", "chosen-rating": 1, "rejected-rating": 2}, "chosen-rating 1 against 2"),
        ({"chosen": "Yes.", "rejected": "No.", "rating_chosen": 1, "rating_rejected": 2}, "rating_chosen 1 against 2"),
        ({"chosen": "Yes.", "rejected": "No.", "responses": ["Yes.", "No."], "scores": [1, 2]}, "is rated lower"),
        ({"chosen": talk("Yes."), "rejected": talk("No."), "responses": ["Yes.", "No."], "ranks": [2, 1]},
         "is rated lower"),
        ({"chosen": "Yes.", "rejected": "No.", "response_a": "Yes.", "response_b": "No.", "winner": "b"},
         "'chosen' and 'winner' do not"),
        ({"response_1": "Yes.", "response_2": "No.", "winner": 1, "preference_strength": 1},
         "'winner' and 'preference_strength' do not"),
        ({"response_1": "Yes.", "response_2": "No.", "annotators": [2, 2, 1], "winner": 1},
         "'annotators' and 'winner'"),
        ({"human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1, "score_A": 1, "score_B": 2},
         "'labels' and 'score_A'"),
        ({"responses": ["a", "b", "c"], "scores": [1, 2, 2], "ranks": [2, 3, 1]}, "'scores' and 'ranks' do not order"),
        ({"responses": ["a", "b"], "completions": ["a", "b"], "scores": [1, 2]}, "are both lists of answers"),
        ({"completions": [{"response": "a"}, {"response": "b"}]}, "give each its 'rating'"),
        ({"completions": [{"response": "a", "rating": 1}, {"response": "b"}]}, "'rating' must be a number, not None"),
        ({"completions": [{"response": "a", "rating": 1}, "b"]}, "answer 2 of the list must have one text"),
        ({"responses": ["a", "b"], "scores": [1]}, "2 responses but 1 scores"),
        ({"responses": ["a", "b"], "ratings": [1, 2], "margin": 1}, "'margin' goes with one pair"),
        ({"response": "a", "helpfulness": 4, "correctness": 3}, "no 'rating', but 'helpfulness', 'correctness'"),
        ({"completion": "a", "label": True}, "'label' says good or bad of one answer"),
        ({"response_0": "a", "response_1": "b", "better_response_id": 2}, "'better_response_id' is 2; 0 or 1"),
        ({"response_0": "a", "response_1": "b", "response_2": "c", "winner": 1}, "may be any of 'response_1'"),
        ({"chosen": "a", "rejected": "b", "system": "x", "system_prompt": "y"}, "are different system turns"),
        ({"prompt": [SYSTEM, *talk("a")[:1]], "chosen": "a", "rejected": "b", "system": "y"}, "different system turns"),
        ({"response_a": "a", "response_b": "b", "winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0},
         "must be 1"),
        ({"prompt": '["p"]', "response_a": '["a", "b"]', "response_b": '["c"]', "winner_model_a": 1},
         "2 in 'response_a'"),
        ({"prompt": None, "info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "no 'post'"),
        ({"prompt": None, "info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0}, "two were expected"),
        ({"prompt": None, "question": {"full_text": "p"}, "answer_0": "a", "answer_1": "b", "score_0": 1}, "'score_1'"),
        ({"chosen": "a", "rejected": "b", "messages": [*talk("x")[:1], {"role": "user", "content": "Other?"}],
          "prompt": "Coffee?"}, "'prompt' and 'messages' are different conversations"),
        ({"chosen": "a", "rejected": "b", "system": ["x"]}, "'system' must be text, not list"),
        ({"chosen": "a", "rejected": "b", "margin": 1e308}, "at most 1e"),
        ({"chosen": [{**talk("a")[1], "reasoning_content": "Hm."}], "rejected": talk("b")[1:]}, "'reasoning_content'"),
        ({"chosen": [{**talk("a")[1], "tool_calls": [{"id": 1}]}], "rejected": talk("b")[1:]}, "'tool_calls'"),
        ({"prompt": None, "system": "x", "question": "p", "input": "q", "chosen": "a", "rejected": "b"},
         "may all be the prompt"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other_are_refused(row: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preferences_of({"prompt": "Tea?", **row})


@pytest.mark.parametrize("prompt", ["Tea?", talk("Yes.")[:1]])
def test_a_conversation_may_repeat_the_prompt_with_its_answer(prompt: object) -> None:
    row = {"prompt": prompt, "messages": talk("Yes."), "chosen": talk("Yes."), "rejected": talk("No.")}
    [pair] = preferences_of(row)  # type: ignore[misc]
    assert (pair.prompt, pair.chosen) == (talk("Yes.")[:1], "Yes.")


@pytest.mark.parametrize("history", [[["Hm?", "So?"]], talk("So?")])
def test_turns_before_the_prompt_are_read(history: list) -> None:
    """Where they are a column of their own, they were shown to whoever chose."""
    earlier = [history[0][0], history[0][1]] if isinstance(history[0], list) else [turn["content"] for turn in history]
    expected = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), [*earlier, "And milk?"], strict=True)
    ]
    row = {"prompt": "And milk?", "history": history}
    assert preferences_of({**row, "chosen": "Yes.", "rejected": "No."}) == [Preference(expected, "Yes.", "No.")]
    rated = {**row, "responses": ["Yes.", "No."], "ratings": [2, 1]}
    assert preferences_of(rated) == [Preference(expected, "Yes.", "No.")]
    assert preferences_of({**row, "history": [], "chosen": "Yes.", "rejected": "No."})[0].prompt == "And milk?"


def test_turns_before_the_prompt_that_cannot_be_joined_with_it_are_refused() -> None:
    answers = {"chosen": "Yes.", "rejected": "No."}
    with pytest.raises(ValueError, match="'history' must be pairs"):
        preferences_of({"prompt": "x", "history": ["a", "b"], **answers})
    with pytest.raises(ValueError, match="'prompt' is not text to follow them"):
        preferences_of({"prompt": talk("a")[:1], "history": [["a", "b"]], **answers})
    with pytest.raises(ValueError, match="ends in a turn of the user"):
        preferences_of({"messages": talk("a")[:1], "rejected_response": "b"})
    with pytest.raises(ValueError, match="a conversation that ends in the chosen answer"):
        preferences_of({"messages": "a", "rejected_response": "b"})


def test_text_beside_the_prompt_is_said(tmp_path: Path) -> None:
    row = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    path = write(tmp_path / "x.jsonl", row | {"context": "It is hot."}, row | {"input": "Tea?", "chosen": "So."})
    understood = Understood(str(path), silent=True)
    read_preferences(path, understood=understood)
    assert understood.notes == {"have 'context' beside the text, which no model is shown": (1, "line 1")}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"Prompt": "Tea?"}, "no 'prompt', but 'Prompt'; rename"),
        ({"prompt ": "Tea?"}, "no 'prompt', but 'prompt '; rename"),
        ({"question": "Tea?", "context": "Hot."}, "but 'question'; rename"),
        ({"instruction": "Answer.", "query": "Tea?"}, "but 'instruction' and 'query'; join in 'prompt' what is asked"),
        ({"trajectory": [{"from": "user", "value": "Tea?"}]}, "but the turns in 'trajectory'; rename"),
    ],
)
def test_a_prompt_under_another_name_is_not_what_two_texts_share(columns: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preferences_of({**columns, "chosen": "The film was good.", "rejected": "The film was gory."})


def test_a_row_without_a_prompt_is_told_by_its_columns() -> None:
    with pytest.raises(ValueError, match="no 'prompt', but 'Prompt'; rename it to 'prompt'"):
        prompt_of({"Prompt": "p", "Chosen": "a"})
    with pytest.raises(ValueError, match="no 'prompt'; the row has 'Ask', 'Chosen'"):
        prompt_of({"Ask": "p", "Chosen": "a"})


def test_a_summary_is_asked_for_as_its_models_were() -> None:
    info = {"post": "Long.", "title": "T", "subreddit": "tea", "article": None}
    row = {"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    assert preferences_of(row) == [Preference("SUBREDDIT: r/tea\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:", "b", "a")]
    assert preferences_of({**row, "info": {"article": "News."}}) == [Preference("News.\n\nTL;DR:", "b", "a")]


def test_all_pairs_of_rated_answers_are_taken_and_equal_ratings_are_named(tmp_path: Path) -> None:
    rated = [{"response": text, "overall_score": score} for text, score in (("a", 4), ("b", 3), ("c", 3), ("d", 1))]
    path = write(tmp_path / "rows.jsonl", {"instruction": "Tea?", "completions": rated})
    understood = Understood(str(path), silent=True)
    pairs = read_preferences(path, understood=understood)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")
    }  # fmt: skip
    [(what, (count, example))] = understood.notes.items()
    assert (what, count, example) == (
        "rate several answers the same; such pairs are left out", 1, "line 1: '[4.0, 3.0, 3.0, 1.0]'"
    )  # fmt: skip
    same = write(
        tmp_path / "same.jsonl",
        {"prompt": "x", "responses": ["a", "b"], "scores": [2, 2]},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    )
    understood = Understood(str(same), silent=True)
    assert len(read_preferences(same, understood=understood)) == understood.ties == 1


def test_one_answer_a_row_is_compared_with_the_others_of_its_prompt(tmp_path: Path) -> None:
    rows = ({"messages": talk("No."), "score": 1}, {"messages": talk("Yes."), "score": 5})
    assert read_preferences(write(tmp_path / "rows.jsonl", *rows)) == [Preference(talk("")[:1], "Yes.", "No.")]


def test_a_column_of_system_turns_comes_first_and_must_agree(tmp_path: Path) -> None:
    user, answer = talk("Yes.")
    expected = [SYSTEM, user]
    beside = {"system": "Be brief."}
    for row in (
        {"question": "Tea?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [user], "chosen": "Yes.", "rejected": "No."},
        {"prompt": expected, "chosen": "Yes.", "rejected": "No."},
        {"chosen": talk("Yes."), "rejected": talk("No.")},
        {"prompt": "Tea?", "chosen": [SYSTEM, *talk("Yes.")], "rejected": [SYSTEM, *talk("No.")]},
        {"prompt": "Tea?", "response_1": "Yes.", "response_2": "No.", "annotators": [1]},
        {"prompt": "Tea?", "responses": ["Yes.", "No."], "ratings": [2, 1]},
    ):
        path = write(tmp_path / "rows.jsonl", {**row, **beside})
        understood = Understood(str(path), silent=True)
        assert read_preferences(path, understood=understood) == [Preference(expected, "Yes.", "No.")]
        assert any("system turn in a column of its own" in what for what in understood.notes)
    for row in ({"prompt": "Tea?", "completion": "Yes."}, {"messages": [user, answer]}):
        [sample] = read_samples(write(tmp_path / "rows.jsonl", {**row, **beside}))
        assert (sample.prompt, sample.completion) == (expected, "Yes.")
    assert read_prompts(write(tmp_path / "rows.jsonl", {"prompt": "Tea?", "system": " "})) == ["Tea?"]
    assert read_prompts(write(tmp_path / "rows.jsonl", {"prompt": "Tea?", **beside})) == [expected]


def test_published_answers_are_scored_and_their_prompts_are_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PUBLISHED["openbmb/UltraFeedback"])
    assert [(one.prompt, one.completion) for one in read_samples(path)] == [("Tea?", "No."), ("Tea?", "Yes.")]
    for row in PUBLISHED.values():
        [prompt] = read_prompts(write(tmp_path / "one.jsonl", row))
        assert (prompt if isinstance(prompt, str) else prompt[-1]["content"]) == "Tea?"
