"""Whatever shapes prompts and completions in training reaches the rollouts of rankings, evaluations and sweeps."""

import json

import demo_model
import pytest
import tool_policy
from transformers import GenerationMixin

from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.preferences import pairs_from_rollouts
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.sampling import sampling_from_text, sampling_of, sampling_of_run, with_given
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.prompts import check_prompt
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, as_chat

# As Qwen3's: it thinks unless it is told not to. Here a thought is "A", which the demo model takes for a new problem.
THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}"
    "{% else %}A{% endif %}{{ '1' * (digits | default(0)) }}"
)
ROWS = [{"prompt": prompt} for prompt in ("A347+085=", "A1+2=")]
SMALL = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
SHAPED = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.3}
TEMPLATE = {"chat_template_kwargs": {"enable_thinking": False, "digits": 2}}
MORE = {"generation_kwargs": {"typical_p": 0.8, "min_new_tokens": 2, "suppress_tokens": [5]}}
CASES = {
    "grpo": {"num_generations": 2, **SHAPED, **TEMPLATE, **MORE, "max_completion_length": 3},
    "rloo": {"num_generations": 2, **SHAPED, **TEMPLATE, **MORE, "max_completion_length": 3},
    "sdpo": {"num_generations": 2, **SHAPED, **TEMPLATE, **MORE, "max_completion_length": 3, "max_prompt_length": 4},
    "gmpo": {"num_generations": 2, **SHAPED, **TEMPLATE, "max_completion_length": 3, "cache_implementation": "dynamic"},
    "online_dpo": {"per_device_train_batch_size": 2, **SHAPED, **MORE, "max_new_tokens": 3},
    "a2po": {
        "num_value_samples": 2,
        "filter_all_incorrect": False,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_completion_length": 3,
        "max_prompt_length": 5,
    },
}
DEFAULTS = {
    "grpo": {"num_generations": 2},
    "online_dpo": {"per_device_train_batch_size": 2},
    "a2po": {"num_value_samples": 2, "filter_all_incorrect": False},
}
KEPT = (("grpo", "shaped"), ("a2po", "defaults"))  # in the default suite
# What decides which tokens come out.
DECIDE = (*SHAPED, "typical_p", "min_new_tokens", "suppress_tokens", "max_new_tokens", "do_sample", "num_beams")


def reward(prompts, completions, **columns):
    return [float(i % 2) for i in range(len(completions))]


def base():
    model, tokenizer = demo_model.load()
    tokenizer.chat_template = THINKS
    model.generation_config.update(top_k=3, repetition_penalty=2.0, no_repeat_ngram_size=2)  # its own generation_config
    return model, tokenizer


@pytest.fixture
def generated(monkeypatch):
    """The calls of `generate`: its prompts, and the settings in effect."""
    calls = []
    generate = GenerationMixin.generate

    def noted(self, *arguments, generation_config=None, **options):
        config, _ = self._prepare_generation_config(generation_config)
        mask = options["attention_mask"].tolist()
        rows = [
            tuple(token for token, kept in zip(ids, own, strict=True) if kept)
            for ids, own in zip(options["input_ids"].tolist(), mask, strict=True)
        ]
        decided = {name: getattr(config, name) for name in (*DECIDE, "no_repeat_ngram_size")}
        calls.append((set(rows), {name: value or None for name, value in decided.items()}))
        return generate(self, *arguments, generation_config=generation_config, **options)

    monkeypatch.setattr(GenerationMixin, "generate", noted)
    return calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        pytest.param(name, config, id=f"{name}-{which}", marks=() if (name, which) in KEPT else pytest.mark.more)
        for which, cases in (("shaped", CASES), ("defaults", DEFAULTS))
        for name, config in cases.items()
    ],
)
def test_rollouts_are_sampled_as_in_training(generated, algorithm, config, chat):
    rows = as_chat(ROWS) if chat else ROWS
    config = config if chat else {name: value for name, value in config.items() if name != "chat_template_kwargs"}
    task = Task("seen", lambda split, n, seed: rows, reward, 3)
    recipe = make_recipe(algorithm, task, SMALL | config)
    train_layer(*base(), task, 1, steps=1, seed=0, recipe=recipe)
    in_training = generated[-1]
    sampling = sampling_of_run(recipe.algorithm, recipe.config(output_dir="unused"))
    sample_rollouts(*base(), task, rows, sampling)
    prompts, settings = generated[-1]
    assert settings == in_training[1]
    assert prompts == in_training[0]
    if "temperature" in config:
        assert settings["temperature"] == 0.7 and settings["max_new_tokens"] == 3

    # and the same from the fields that run.json keeps, which is what an evaluation of the run has
    kept = json.loads(json.dumps(recipe.config(output_dir="unused").to_dict(), default=str))
    assert sampling_of(load_algorithm(algorithm), kept) == sampling


def test_greedy_decoding_keeps_the_prompt_and_the_penalties(generated):
    shaped = Sampling(**SHAPED, **TEMPLATE, **MORE, max_completion_tokens=3)
    task = Task("seen", lambda split, n, seed: ROWS, reward, 3)
    for greedy in (False, True):
        sample_rollouts(*base(), task, as_chat(ROWS), Sampling(**shaped.shape, greedy=greedy, samples=1))
    (prompts, sampled), (same_prompts, greedily) = generated
    assert prompts == same_prompts
    assert (sampled["do_sample"], greedily["do_sample"]) == (True, None)
    for name in ("repetition_penalty", "min_new_tokens", "suppress_tokens", "max_new_tokens"):
        assert sampled[name] == greedily[name] != None  # noqa: E711
    assert greedily["typical_p"] != 0.8 != greedily["temperature"] and sampled["typical_p"] == 0.8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (
            {"generation_kwargs": {"top_pp": 0.9}},
            "sets 'top_pp', which GenerationConfig does not have; did you mean top_p",
        ),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "may not set num_return_sequences"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs may not set tokenize"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs may not set chat_template"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**given)


def test_texts_become_settings_and_nothing_else_does():
    texts = ["top_p=0.9", 'chat_template_kwargs={"enable_thinking": false}', "min_p=none"]
    assert sampling_from_text(texts) == {
        "top_p": 0.9,
        "chat_template_kwargs": {"enable_thinking": False},
        "min_p": None,
    }
    for text, message in (
        ("topp=1", "has no field 'topp'; did you mean top_p"),
        ("samples=3", "field samples is set by --samples, not by --sampling"),
        ("prompts_as_text=true", "is set by the algorithm"),
        ("top_k=many", "--sampling top_k=many: expected an integer or none"),
        ("top_p", "--sampling takes field=value"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling_from_text([text])
    with pytest.raises(ValueError, match="--sampling: top_p is much, expected a number or null"):
        with_given(Sampling(), {"top_p": "much"}, {})


def test_what_only_vllm_understands_is_translated_or_refused():
    fields = {"temperature": 1.0, "max_completion_length": 5, "use_vllm": True}
    sampling = sampling_of(load_algorithm("grpo"), fields | {"generation_kwargs": {"stop": ["."], "min_tokens": 2}})
    assert sampling.generation_kwargs == {"stop_strings": ["."], "min_new_tokens": 2}
    with pytest.raises(ValueError, match=r"'logit_biases', which GenerationConfig does not have.*vLLM takes it, but"):
        sampling_of(load_algorithm("grpo"), fields | {"generation_kwargs": {"logit_biases": {}}})


def test_a_stop_string_ends_a_completion():
    model, tokenizer = tool_policy.load()
    task = Task("seen", lambda split, n, seed: [], reward, 12)
    rows = [{"prompt": "Count\n"}] * 8
    whole, cut = (
        sample_rollouts(model, tokenizer, task, rows, Sampling(samples=1, generation_kwargs=kwargs))
        for kwargs in ({}, {"stop_strings": ["o"]})
    )
    cuts = 0
    for (before,), (after,) in zip(whole, cut, strict=True):
        end = next((i for i, token in enumerate(before.ids) if "o" in tokenizer.decode(token)), len(before.ids))
        assert after.ids[: end + 1] == before.ids[: end + 1]
        assert after.completion == tokenizer.decode(before.ids[: end + 1], skip_special_tokens=True)
        cuts += len(after.completion) < len(before.completion)
    assert cuts


def test_stop_strings_that_trl_cannot_use_are_refused():
    recipe = make_recipe("grpo", None, SMALL | {"num_generations": 2, "generation_kwargs": {"stop_strings": ["."]}})
    with pytest.raises(ValueError, match="stop_strings, for which transformers needs the tokenizer"):
        sampling_of_run(recipe.algorithm, recipe.config(output_dir="unused"))


@pytest.mark.parametrize(
    ("prompt", "names", "message"),
    [
        ("A1+2=", ["enable_thinking"], "the prompts are plain text"),
        (
            [{"role": "user", "content": "A1+2="}],
            ["thinking"],
            "sets thinking, which the chat template of m does not read",
        ),
        ([{"role": "user", "content": "A1+2="}], ["enable_thinking", "digits"], None),
    ],
)
def test_a_template_argument_without_effect_is_refused(prompt, names, message):
    kwargs = dict.fromkeys(names, False)
    _, tokenizer = base()
    if message is None:
        check_prompt({"prompt": prompt}, tokenizer, "m", kwargs)
        return
    with pytest.raises(ValueError, match=message):
        check_prompt({"prompt": prompt}, tokenizer, "m", kwargs)


def test_pairs_say_how_their_prompts_are_written():
    """TRL's offline trainers write a row's prompt by its column "chat_template_kwargs"."""
    model, tokenizer = base()
    task = Task("seen", lambda split, n, seed: ROWS, reward, 5)
    sampling = Sampling(
        samples=4, chat_template_kwargs={"enable_thinking": False}, generation_kwargs={"eos_token_id": 3}
    )
    rows = as_chat(ROWS)
    made = pairs_from_rollouts(model, tokenizer, task, rows, "unpaired", sampling).rows
    assert made and all(row["chat_template_kwargs"] == {"enable_thinking": False} for row in made)
    bare = pairs_from_rollouts(model, tokenizer, task, rows, "unpaired", sampling, kwargs_as_column=False).rows
    assert bare == [{name: value for name, value in row.items() if name != "chat_template_kwargs"} for row in made]
