"""Rollouts: completions of a model for the rows of a task, with their rewards, in one turn or through an environment.

They are the rollouts of `trl.GRPOTrainer` (1.16): the same tokens and rewards and, from the same random state, the same
samples, but without a trainer and without a trace on the model. Text only and one environment class, which is what a
`Task` can hold.
"""

import asyncio
import copy
import inspect
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from peft_onelayer.seams import check
from peft_onelayer.tasks import Task, awaiting, up_to_end
from peft_onelayer.tasks.rows import check_reset, checked_scores, own_reward, own_reward_awaited, reward_columns
from peft_onelayer.tuner.head import spare_head_copies
from peft_onelayer.tuner.prompts import sharing_prompts
from peft_onelayer.tuner.rounded import keeping_rounded

from .settings import Sampling

DEFAULT = Sampling()
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rollout:
    """One completion of a row and its reward.

    Attributes:
        prompt: what the model was given: the row's prompt and, in an environment, the first observation behind it.
        completion: text, up to `Task.end`; for a chat prompt the messages that follow it, tool calls and their results
            among them.
        reward: what the task's reward gave.
        tokens: number of tokens that the model generated, the end-of-sequence token counted, padding and the
            environment's tokens not.
        ended: whether it ends with an end-of-sequence token or a stop string, or went on to `Task.end` or behind an
            answer that `Task.is_over`; False where it was cut.
        prompt_ids: token ids of the prompt.
        ids: token ids behind the prompt, the environment's among them.
        generated: for each of `ids`, whether the model generated it.
    """

    prompt: str | Messages
    completion: str | Messages
    reward: float
    tokens: int
    ended: bool
    prompt_ids: list[int]
    ids: list[int]
    generated: list[bool]


def sample_rollouts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict[str, Any]],
    sampling: Sampling = DEFAULT,
    *,
    adapters: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda done: None,
    log_metric: Callable[[str, float], None] = lambda name, value: None,
) -> list[list[Rollout]]:
    """Complete every row `sampling.samples` times, or once greedily, and grade the completions with the task's reward.

    The model stays on its device; its train or eval mode and torch's random state are as before afterwards.

    Args:
        rows: dicts with a "prompt" (plain text, or a list of chat messages) and the columns that the reward takes.
        sampling: how (default: four samples from the full distribution, without top-k, top-p and penalties).
        adapters: names of adapters of the model, which then complete each row in turns: sample i is of adapter
            i modulo their number. In one batch, in which what lies below the lowest trained block runs once for equal
            prompts. Not for tasks with an environment.
        on_progress: called after every batch with the number of completions done.
        log_metric: what the reward gets to log to, as a trainer's.

    Returns:
        The rollouts of each row, in the rows' order.

    Raises:
        ValueError: without rows, with samples < 1, a prompt that leaves no room in the model's context, chat prompts
            for a tokenizer without a chat template, an environment with one that cannot render tool calls, one whose
            `reset` is a coroutine or gives something else than text, a tool that gives a list, or a reward that
            returned something else than one number per completion.
    """
    if not rows or sampling.samples < 1:
        raise ValueError(
            f"rollouts need at least one row and one sample, got {len(rows)} rows, samples={sampling.samples}"
        )
    chat = not isinstance(rows[0]["prompt"], str)
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts of {task.name} are chat messages, and the model's tokenizer has no chat template; give "
            "plain text, or take a model that has one"
        )
    if not chat and task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment and so needs chat prompts, not plain text")
    if adapters and task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment, where adapters cannot take turns")
    samples = 1 if sampling.greedy else sampling.samples
    player = _Player(model, tokenizer, task, sampling)
    player.log_metric = log_metric
    repeated = [row for row in rows for _ in range(samples)]
    names = [adapters[i % len(adapters)] for _ in rows for i in range(samples)] if adapters else []
    rollouts: list[Rollout] = []
    with _generating(model, sampling.seed):
        for start in range(0, len(repeated), sampling.batch_size):
            player.adapters = names[start : start + sampling.batch_size]
            rollouts += player.play(repeated[start : start + sampling.batch_size])
            on_progress(len(rollouts))
    return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]


def check_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict[str, Any]],
    how: Sampling,
) -> None:
    """Raise ValueError where a prompt of `rows` leaves no room for a completion in the model's context.

    A prompt of a task with an environment is known only once that has begun, and is not looked at.
    """
    if task.environment_factory is None:
        _Player(model, tokenizer, task, how).check_room(rows)


@contextmanager
def _generating(model: PreTrainedModel | PeftModel, seed: int) -> Iterator[None]:
    """Eval mode, no gradients, torch seeded, nothing computed twice; on exit all as before."""
    devices = [model.device] if model.device.type == "cuda" else []
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    hooks = spare_head_copies(model)
    try:
        with (
            torch.no_grad(),
            keeping_rounded(),
            sharing_prompts(model),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in training_modules:
            module.training = True


@dataclass
class _Episode:
    """A rollout under way."""

    prompt: Any  # as in Rollout
    prompt_ids: list[int]
    ids: list[int]  # everything behind the prompt: the model's tokens and the environment's
    completion: Any  # as in Rollout
    generated: list[bool]  # for each of `ids`, whether it is the model's
    tools: dict[str, Callable[..., Any]]


class _Player:
    """Plays batches of rows: generates, lets the environments answer, and grades."""

    log_metric: Callable[[str, float], None]
    adapters: Sequence[str] = ()  # of the batch, one for each row

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        sampling: Sampling,
    ) -> None:
        self.model, self.tokenizer, self.task, self.sampling = model, tokenizer, task, sampling
        self.max_completion_tokens = sampling.max_completion_tokens or task.max_completion_tokens
        # Some configurations have no such limit (ALiBi, state-space models).
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # As GRPOTrainer: every end-of-sequence id that the model declares ends a completion, and the tokenizer's.
        declared = model.generation_config.eos_token_id
        eos = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
        self.eos = sorted(eos)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Spelled out because generate() fills every field left out from the model's own generation_config.json.
        self.generation_config = GenerationConfig(
            **{
                "max_new_tokens": self.max_completion_tokens,
                "num_beams": 1,
                "pad_token_id": self.pad,
                "eos_token_id": self.eos,
                "use_cache": True,
                "disable_compile": True,
                **sampling.generation(),
            }
        )
        self.environments: list[Any] = []  # made once and reset for every rollout, as TRL does
        self.chat_template: str | None = None
        if task.environment_factory is not None:
            self._prepare_tools()

    def check_room(self, rows: Sequence[dict[str, Any]]) -> None:
        """As the function of this name."""
        self._check_context(self._prompt_ids([row["prompt"] for row in rows], [{} for _ in rows]))

    def _prepare_tools(self) -> None:
        """Make the tokenizer able to write tool results and to read tool calls, the way `GRPOTrainer.__init__` does."""
        check(__name__)
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            is_chat_template_prefix_preserving,
            supports_tool_calling,
        )

        if not supports_tool_calling(self.tokenizer):
            raise ValueError(
                f"task {self.task.name} plays through tool calls, which the tokenizer's chat template cannot write; "
                "use a model with a tool-calling template"
            )
        if self.tokenizer.response_template is None:
            self.tokenizer = add_response_schema(copy.copy(self.tokenizer))
        if not is_chat_template_prefix_preserving(self.tokenizer):
            self.chat_template = get_training_chat_template(self.tokenizer)

    def play(self, rows: Sequence[dict[str, Any]]) -> list[Rollout]:
        """Complete each row once and grade the completions."""
        episodes = self._begin(rows)
        if self.task.environment_factory is not None:
            self._continue_with_tools(episodes)
        return self._grade(rows, episodes)

    def _begin(self, rows: Sequence[dict[str, Any]]) -> list[_Episode]:
        """Reset the environments, render the prompts, and generate the first turn."""
        prompts = [copy.deepcopy(row["prompt"]) for row in rows]
        tools: list[dict[str, Callable[..., Any]]] = [{} for _ in rows]
        chat = not isinstance(prompts[0], str)
        if self.task.environment_factory is not None:
            while len(self.environments) < len(rows):
                self.environments.append(self.task.environment_factory())
                check_reset(self.environments[-1])
            for i, row in enumerate(rows):
                observation = self.environments[i].reset(**copy.deepcopy(row))
                if observation is not None:
                    if not isinstance(observation, str):
                        raise ValueError(_not_text(f"{type(self.environments[i]).__name__}.reset", observation))
                    last = prompts[i][-1]
                    prompts[i] = [*prompts[i][:-1], {**last, "content": last["content"] + observation}]
                tools[i] = _tools(self.environments[i])
        prompt_ids = self._prompt_ids(prompts, tools)
        self._check_context(prompt_ids)
        generated = self._generate(prompt_ids)
        return [
            _Episode(
                prompt,
                before,
                ids,
                [self._message(before, ids, own)] if chat else self._text(ids),
                generated=[True] * len(ids),
                tools=own,
            )
            for prompt, before, ids, own in zip(prompts, prompt_ids, generated, tools, strict=True)
        ]

    def _prompt_ids(self, prompts: list[Any], tools: list[dict[str, Callable[..., Any]]]) -> list[list[int]]:
        """The tokens of the prompts, as the trainer makes them."""
        kwargs, longest = self.sampling.chat_template_kwargs, self.sampling.max_prompt_length
        if self.sampling.prompts_as_text:
            from trl.data_utils import maybe_apply_chat_template

            texts = [
                maybe_apply_chat_template({"prompt": prompt}, self.tokenizer, **kwargs)["prompt"] for prompt in prompts
            ]
            cut = {} if longest is None else {"truncation": True, "max_length": longest}
            return self.tokenizer(texts, add_special_tokens=False, **cut)["input_ids"]
        if isinstance(prompts[0], str):
            ids = self.tokenizer(prompts)["input_ids"]
        else:
            ids = [
                self.tokenizer.apply_chat_template(
                    prompt,
                    tools=list(own.values()) or None,
                    chat_template=self.chat_template,
                    add_generation_prompt=True,
                    return_dict=True,
                    **kwargs,
                )["input_ids"]
                for prompt, own in zip(prompts, tools, strict=True)
            ]
        return ids if longest is None else [own[-longest:] for own in ids]

    def _check_context(self, prompt_ids: list[list[int]]) -> None:
        longest = max(map(len, prompt_ids))
        # In an environment TRL ends the episode where the context is full; a single turn has to fit.
        most = self.generation_config.max_new_tokens
        room = 1 if self.task.environment_factory is not None else most
        if self.context is not None and longest + room > self.context:
            raise ValueError(
                f"a prompt of {longest} tokens and a completion of up to {most} do not fit into "
                f"the model's context of {self.context} tokens; {_shorter(self.context - longest)}"
            )

    def _generate(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Continue each sequence up to and including its first end-of-sequence token."""
        length = max(map(len, prompt_ids))
        input_ids = torch.tensor([[self.pad] * (length - len(ids)) + ids for ids in prompt_ids])  # (B, P) int64
        attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids])  # (B, P)
        tokens = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            generation_config=self.generation_config,
            **({"tokenizer": self.tokenizer} if self.generation_config.stop_strings else {}),
            **({"adapter_names": list(self.adapters)} if self.adapters else {}),
        )  # (B, P + T)
        return [self._until_eos(ids) for ids in tokens[:, length:].tolist()]

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos), len(ids))
        ids = ids[: end + 1]
        if self.generation_config.stop_strings:  # these end a completion without a token that says so
            while len(ids) > 1 and ids[-1] == self.pad and self.pad not in self.eos:
                ids.pop()
        return ids

    def _ended(self, episode: _Episode) -> bool:
        """Whether it ends as `Rollout.ended` says."""
        completion, is_over = episode.completion, self.task.is_over
        if episode.ids[-1] in self.eos or self._counted(completion) != completion:
            return True
        if isinstance(completion, str) and is_over is not None and is_over(completion):
            return True
        stops = self.generation_config.stop_strings or []
        text = self._text(episode.ids)
        return any(stop in text for stop in ([stops] if isinstance(stops, str) else stops))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _message(self, before: list[int], ids: list[int], tools: dict[str, Callable[..., Any]]) -> dict[str, Any]:
        """Return the assistant message that the model wrote as `ids` behind `before`."""
        if self.tokenizer.response_template is None:
            return {"role": "assistant", "content": self._text(ids)}
        from trl.chat_template_utils import parse_response

        # From 1.16 TRL has the tools' schemas decide the types of a call's arguments.
        takes_tools = "tools" in inspect.signature(parse_response).parameters
        typed = {"tools": list(tools.values())} if takes_tools else {}
        return parse_response(self.tokenizer, ids, prefix=before, **typed)

    def _continue_with_tools(self, episodes: list[_Episode]) -> None:
        """Call the tools that the last messages ask for and generate on, until no message asks (TRL's tool loop)."""
        active = [episode for episode in episodes if episode.completion[-1].get("tool_calls")]
        turns = self.sampling.max_tool_calling_iterations
        for _ in itertools.count() if turns is None else range(turns):
            if not active:
                return
            answers, contexts, going_on = [], [], []
            for episode in active:
                messages = _call(episode.completion[-1]["tool_calls"], episode.tools)
                behind = episode.ids + self._tool_message_ids(messages)
                context = episode.prompt_ids + behind
                if len(behind) > self.max_completion_tokens or (self.context and len(context) >= self.context):
                    continue  # no room for the answer: the episode ends with the call
                answers.append(messages)
                contexts.append(context)
                going_on.append(episode)
            generated = self._generate(contexts) if going_on else []
            active = []
            for episode, messages, context, new in zip(going_on, answers, contexts, generated, strict=True):
                behind = context[len(episode.prompt_ids) :]
                new = new[: self.max_completion_tokens - len(behind)]
                answered = len(behind) - len(episode.ids)
                episode.ids = behind + new
                episode.generated += [False] * answered + [True] * len(new)
                episode.completion += messages
                if new:
                    episode.completion.append(self._message(context, new, episode.tools))
                    if episode.completion[-1].get("tool_calls"):
                        active.append(episode)

    def _tool_message_ids(self, messages: Messages) -> list[int]:
        """Return the tokens that the template writes for tool results and the opening of the next turn.

        Found as `GRPOTrainer._get_tool_suffix_ids` finds them: the difference that the messages make behind a call.
        """
        name = messages[0]["name"]  # some templates derive the header of a result from the call's name
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        dialogue = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        settings = {"chat_template": self.chat_template, "tokenize": True, "return_dict": False}
        settings |= self.sampling.chat_template_kwargs
        before = self.tokenizer.apply_chat_template(dialogue, add_generation_prompt=False, **settings)
        after = self.tokenizer.apply_chat_template(dialogue + messages, add_generation_prompt=True, **settings)
        # The model's turn ended with the end-of-sequence token; what the template writes behind it is still to come.
        ends = [i for i, token in enumerate(before) if token == self.tokenizer.eos_token_id]
        return after[ends[-1] + 1 if ends else len(before) :]

    def _grade(self, rows: Sequence[dict[str, Any]], episodes: list[_Episode]) -> list[Rollout]:
        prompts = [episode.prompt for episode in episodes]
        completions = [episode.completion for episode in episodes]
        columns: dict[str, Any] = reward_columns(rows)
        if self.task.environment_factory is not None:
            columns["environments"] = self.environments[: len(rows)]
        # What TRL passes to every reward beside the columns; there is no training to follow and no table to write to.
        columns |= {
            "completion_ids": [episode.ids for episode in episodes],
            "trainer_state": TrainerState(),
            "log_extra": lambda column, values: None,
            "log_metric": self.log_metric,
        }
        scores = self.task.reward(prompts=prompts, completions=completions, **columns)
        rewards = checked_scores(f"the reward of {self.task.name}", scores, len(rows))
        if hasattr(self.task.environment_factory and type(self.environments[0]), "get_reward"):  # TRL adds it
            own = _own_rewards(self.environments[: len(rows)])
            rewards = [a + b for a, b in zip(rewards, own, strict=True)]
        return [
            Rollout(
                prompt=episode.prompt,
                completion=self._counted(episode.completion),
                reward=reward,
                tokens=sum(episode.generated),
                ended=self._ended(episode),
                prompt_ids=episode.prompt_ids,
                ids=episode.ids,
                generated=episode.generated,
            )
            for episode, reward in zip(episodes, rewards, strict=True)
        ]

    def _counted(self, completion: Any) -> Any:
        return up_to_end(completion, self.task.end) if isinstance(completion, str) else completion


def _tools(environment: Any) -> dict[str, Callable[..., Any]]:
    """Return the tools of an environment, by name: its public methods but `reset` and `get_reward` (TRL's names)."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    names = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
    return {name: getattr(environment, name) for name in names}


def _call(calls: Sequence[dict[str, Any]], tools: dict[str, Callable[..., Any]]) -> Messages:
    """Call tools and return their results as messages, those that are awaited behind the others; whatever they raise is
    told to the model. All as TRL does, which awaits them together.

    Raises:
        ValueError: a tool gave a list, which a trainer takes for the parts of a multimodal message.
    """
    results: list[tuple[str, Any]] = []
    awaited: list[tuple[str, Any]] = []
    for call in calls:
        name = call["function"]["name"]
        try:
            if name not in tools:
                raise ValueError(f"Tool {name} not found.")
            result = tools[name](**call["function"]["arguments"])
        except Exception as error:
            results.append((name, {"error": str(error)}))
        else:
            (awaited if inspect.iscoroutinefunction(tools[name]) else results).append((name, result))
    if awaited:
        names, coroutines = zip(*awaited, strict=True)
        for name, result in zip(names, awaiting.run(_together(coroutines)), strict=True):
            results.append((name, {"error": str(result)} if isinstance(result, Exception) else result))
    for name, result in results:
        if isinstance(result, list):
            raise ValueError(_not_text(f"the tool {name}", result))
    return [{"role": "tool", "name": name, "content": str(result)} for name, result in results]


async def _together(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of coroutines; of those that raise, the exception."""
    return await asyncio.gather(*coroutines, return_exceptions=True)


def _own_rewards(environments: Sequence[Any]) -> list[float]:
    """What the environments' `get_reward` gives."""
    if not inspect.iscoroutinefunction(type(environments[0]).get_reward):
        return [own_reward(environment) for environment in environments]

    async def in_turn() -> list[float]:
        return [await own_reward_awaited(environment) for environment in environments]

    return awaiting.run(in_turn())


def _not_text(what: str, value: Any) -> str:
    return f"{what} gave a {type(value).__name__}, and rollouts are text alone; return text"


def _shorter(room: int) -> str:
    """What to do where so many tokens are left for a completion."""
    if room < 1:
        return "shorten the prompts"
    return (
        f"shorten the prompts or allow fewer tokens: --set max_completion_length={room} (onelayer eval: --max-tokens "
        f"{room}), or MAX_COMPLETION_TOKENS = {room} in a task's file"
    )
