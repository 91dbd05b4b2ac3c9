"""What a run finds out with its base before it trains: blocks, a learning rate, data for an offline algorithm."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.probe.rate import find_learning_rate
from peft_onelayer.records.files import PROFILE, read_text
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import LearningRate, RunRecord
from peft_onelayer.rl.preferences import OfflineData, pairs_from_rollouts
from peft_onelayer.tasks import Task

from .folder import RunFolder
from .plan import SAMPLES_PER_PAIR, TrainingPlan
from .progress import Progress
from .ranking import describe, explain, rank_blocks

PAIRS = "pairs.jsonl"


class Preparation:
    """What stands before the training of `plan`; results are kept in `folder`, so that a resumed run has the same."""

    def __init__(self, plan: TrainingPlan, folder: RunFolder, progress: Progress) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress

    def choices(
        self,
        record: RunRecord,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        init_adapter: Path | None = None,
    ) -> RunRecord:
        """The run with blocks and a learning rate, each found where none is given; it starts from `init_adapter`.

        Raises:
            ValueError: completions that teach nothing, in one line, after three of them are shown.
        """
        task = self.plan.task
        if not self.plan.algorithm.online or task is None:
            return record
        try:
            if record.layers is None and not self.plan.settings.full:
                record = self._chosen(record, base, tokenizer, task)
            if "learning_rate" not in self.plan.recipe.given and record.learning_rate is None:
                record = self._with_found_rate(record, base, tokenizer, task, init_adapter)
        except NothingToLearnError as error:
            raise self.explain(error) from error
        self.folder.write_record(record)
        return record

    def _kept_ranking(self) -> LayerRanking | None:
        path = self.folder.path / PROFILE
        return LayerRanking.from_json(read_text(path), str(path)) if path.exists() else None

    def _chosen(
        self, record: RunRecord, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> RunRecord:
        """The run with the blocks and the learning rate that a ranking chooses; it is kept for a resumption."""
        ranking = self._kept_ranking()
        if ranking is None:
            ranking = rank_blocks(
                base,
                tokenizer,
                task,
                self.progress,
                seed=self.plan.settings.seed,
                training_steps=self.plan.config.max_steps,
                recipe=self.plan.recipe,
                method=self.plan.settings.method,
                budget=self.plan.settings.budget,
                batch_size=self.plan.generate,
            )
            ranking = _of_first_process(ranking)
            self.folder.write(PROFILE, ranking.to_json())
        rate, why = ranking.choice_learning_rate, describe(ranking)
        if rate is not None and rate != self.plan.config.learning_rate:
            why.insert(1, f"trained at the learning rate {rate:.3g} that the ranking found for it")
            found = LearningRate(self.plan.config.learning_rate, "ranking", blocks=len(ranking.choice))
            record = self._with_rate(record, rate, found)
        why_text = "; ".join(why)
        self.progress.note(why_text)
        return replace(record, layers=ranking.choice, why=why_text)

    def _with_found_rate(
        self,
        record: RunRecord,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        init_adapter: Path | None,
    ) -> RunRecord:
        """The run with a learning rate that moves the policy far enough; on a resumption the one found before."""
        previous = self.folder.previous
        if previous and previous.learning_rate:
            return self._with_rate(record, previous.settings.config["learning_rate"], previous.learning_rate)
        with self.progress.status("finding a learning rate ..."):
            found = _of_first_process(
                find_learning_rate(
                    base,
                    tokenizer,
                    task,
                    record.layers,
                    self.plan.recipe,
                    mask=self.plan.settings.mask,
                    init_adapter=init_adapter,
                    seed=self.plan.settings.seed,
                    batch_size=self.plan.generate,
                )
            )
        self.progress.note(f"{found.describe()}; --learning-rate sets another")
        how = {name: value for name, value in asdict(found).items() if name != "learning_rate"}
        return self._with_rate(
            record, found.learning_rate, LearningRate(self.plan.config.learning_rate, "first step", **how)
        )

    def _with_rate(self, record: RunRecord, rate: float, how: LearningRate) -> RunRecord:
        self.plan.config.learning_rate = rate
        config = {**record.settings.config, "learning_rate": rate}
        return replace(record, settings=replace(record.settings, config=config), learning_rate=how)

    def explain(self, error: NothingToLearnError) -> ValueError:
        """What to say, in one line, of completions that teach nothing; three of them are shown."""
        assert self.plan.task is not None
        return explain(error, self.plan.task, self.plan.algorithm, self.progress)

    def pairs(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: int) -> OfflineData:
        """Offline data from graded rollouts of the base, kept in pairs.jsonl so that a resumed run has the same."""
        assert self.plan.sampling is not None
        kept = self.folder.path / PAIRS
        if kept.exists():
            lines = kept.read_text(encoding="utf-8").splitlines()
            return OfflineData([json.loads(line) for line in lines], task.data, {})
        with self.progress.bar(f"sampling {prompts} prompts", prompts * SAMPLES_PER_PAIR, "completion") as update:
            data = pairs_from_rollouts(
                base,
                tokenizer,
                task,
                task.rows("train", prompts, self.plan.settings.seed),
                self.plan.algorithm.data,
                self.plan.sampling,
                kwargs_as_column="chat_template_kwargs" not in self.plan.config.to_dict(),
                on_progress=lambda done: update(done, ""),
            )
        data = _of_first_process(data)
        self.progress.note(", ".join(f"{count} {what}" for what, count in data.counts.items()))
        self.folder.write(PAIRS, "".join(json.dumps(row) + "\n" for row in data.rows))
        return data


def _of_first_process(value: Any) -> Any:
    """The first process' value: on a GPU the others may have rounded differently."""
    return broadcast_object_list([value])[0]
