"""Text adventures: TextWorld games (arXiv 1806.11532), played by calling one tool, `act`.

Two families of games, each made from a seed by TextWorld's generator and played by TextWorld's engine:

- `textworld`: games of `textworld.generator.make_game` (4 rooms, 8 objects, a quest of 4 commands, one point),
  compiled by Inform 7 and played as prose, for an instruct model. The objective names the goal, not the way to it.
- `textworld:tiny`: fetch an object and put it where it belongs (3 rooms, 2 objects, 3 to 5 commands, one point).
  Played by TextWorld's logic engine, without a compiler. What the player sees is rendered in a few words, so that an
  episode fits into 320 tokens of the small model in examples/textworld/.

A worked example (the file of the game lands in `cache_folder()`):

    >>> task = load("tiny")
    >>> (row,) = task.rows("train", 1, seed=0)
    >>> environment = task.environment_factory()
    >>> environment.reset(**row)  # the objective; the room and what stands and lies in it; the commands
    'put book on desk . garden . go south'
    >>> environment.act("go south")
    'cellar chest . close chest , go north , go west , take book from chest'
    >>> environment.act("take book from chest")
    'cellar chest . close chest , drop book , go north , go west , insert book into chest'
    >>> environment.act("go west")
    'attic desk . drop book , go east , put book on desk , take cup from desk'
    >>> environment.act("put book on desk"), environment.score, environment.rewards
    ('won', 1.0, [0.0, 0.0, 0.0, 1.0])

Rows carry a split and a seed. The game is made when an environment first needs it (some 20 ms, a few seconds where it
is compiled) and kept. It belongs to the test split when the hash of its content (the facts at the start and those that
win, by the names that the player reads) says so, and a seed draws games until one belongs to its split: whatever the
seeds, no test game has the content of a train game. Two seeds of one split may draw the same game, but rarely do.

Games that can be lost, timed events and games made elsewhere are not covered, and the prose of the compiled games is
TextWorld's, oddities included.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import HELD_OUT, Task, draw_problems

if TYPE_CHECKING:
    from textworld.core import GameState
    from textworld.generator.game import Game, GameOptions
    from textworld.logic import Action, Proposition

SEEDS = 10**6  # of a family; one in eight belongs to the test split
CACHE_VERSION = 1  # raised when a family's games change
INFOS = (
    "admissible_commands",
    "possible_admissible_commands",
    "policy_commands",
    "facts",
    "description",
    "inventory",
    "objective",
    "max_score",
)
INVALID = "Invalid command."  # what TextWorld's logic engine says of a command that is not admissible
UNLISTED = re.compile("look$|inventory$|examine ")  # they change nothing and say what the player has been told

TINY_ROOMS = ("kitchen", "attic", "cellar", "garden", "office", "hall")
TINY_CONTAINERS = ("chest", "box", "crate", "drawer")
TINY_SUPPORTERS = ("table", "shelf", "bench", "desk")
TINY_OBJECTS = ("coin", "lamp", "book", "cup", "rope", "vase", "ring", "brush")
OPPOSITE = {"north": "south", "east": "west", "south": "north", "west": "east"}

SYSTEM = (
    "You play a text adventure. In every turn call the tool `act` with one command, written exactly as in the list "
    "of possible commands. Reach the objective in as few commands as you can. When the game is over, stop."
)


@dataclass(frozen=True)
class Family:
    """A kind of game.

    Attributes:
        name: as in `textworld:tiny`; "" is the default family.
        make: makes the game of an integer seed.
        suffix: ".z8" for games that are compiled and played as prose, ".json" for TextWorld's logic engine.
        prompt: the chat messages before the first observation, which TRL appends to the last of them.
        max_commands: an episode ends after as many commands, those that do nothing included.
        max_completion_tokens: room for an episode, observations included.
    """

    name: str
    make: Callable[[int], Game]
    suffix: str
    prompt: tuple[dict[str, str], ...]
    max_commands: int
    max_completion_tokens: int


class TextWorldEnvironment:
    """A player's seat in TRL's `environment_factory`: `act` is the only tool, `reset` starts the game of a row.

    Made once, reset often. Properties are no tools; `GiGPOTrainer` reads `state` and `score`.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._terse = family.suffix == ".json"  # the logic engine has no prose
        self._engine: Any = None  # a textworld.Environment
        self._now: GameState = None
        self._points: list[int] = []  # at the start and after every command

    def reset(self, split: str, seed: int, **columns: Any) -> str:
        """Start the game of a row.

        Args:
            split: "train" or "test".
            seed: of the game.
            columns: the row's other columns; not used.

        Returns:
            The objective and the first observation.

        Raises:
            ValueError: for an unknown split.
        """
        import textworld

        path = game_file(self._family, split, seed)
        if self._engine is not None:
            self._engine.close()  # loading another game into it loses half a megabyte each time (jericho 3.3)
        self._engine = textworld.start(str(path), textworld.EnvInfos(**dict.fromkeys(INFOS, True)))
        self._now = self._engine.reset()
        self._points = [0]
        objective = _prose(self._now["objective"])
        return f"{objective} . {self.state}" if self._terse else f"Objective: {objective}\n\n{self.state}"

    def act(self, command: str) -> str:
        """Enter one command into the game.

        Args:
            command: The command, written as in the list of possible commands, such as "open chest".

        Returns:
            What happens, and the possible commands.
        """
        if self.done:
            return self._ending
        # Only what TextWorld lists for this game reaches the interpreter, which is enough to win. Its other commands
        # save files, take moves back, switch traces on, or put several commands into one ("take cup. go east").
        known = {possible.casefold(): possible for possible in self._now["possible_admissible_commands"]}
        entered = known.get(" ".join(command.split()).casefold())
        if entered is None:
            reply = INVALID
            self._points.append(self._points[-1])
        else:
            self._now, points, _ = self._engine.step(entered)
            reply = _prose(self._now["feedback"])
            self._points.append(points)
        if self._terse:
            seen = f"invalid . {self.state}" if reply == INVALID else self.state
            return self._ending if self.done else seen
        return f"{reply}\n{self._ending if self.done else self._standing}"

    @property
    def admissible_commands(self) -> list[str]:
        """The commands that change the game's state now, sorted."""
        return [command for command in self._now["admissible_commands"] if not UNLISTED.match(command)]

    @property
    def policy_commands(self) -> list[str]:
        """Commands that win from here, as TextWorld tracks them: for imitation and tests, never part of an observation.

        Not always the fewest, and empty once the game is over.
        """
        return list(self._now["policy_commands"])

    @property
    def state(self) -> str:
        """What the player sees, carries and can do now: GiGPO's anchor state.

        It does not tell how the player got here, so that the same situation reached in two ways is one state.
        """
        if self._terse:
            return _tiny_words(self._now["facts"], self.admissible_commands)
        return f"{_prose(self._now['description'])}\n{_prose(self._now['inventory'])}\n{self._standing}"

    @property
    def score(self) -> float:
        """Points so far over the points of the game: from 0 to 1, and 1 when the game is won."""
        return self._points[-1] / self._now["max_score"]

    @property
    def rewards(self) -> list[float]:
        """The reward of each command so far, the difference it made to `score`."""
        return [(after - before) / self._now["max_score"] for before, after in pairwise(self._points)]

    @property
    def won(self) -> bool:
        """Whether the objective is reached."""
        return bool(self._now["won"])

    @property
    def done(self) -> bool:
        """Whether the episode has ended: the game is won, or the commands are used up."""
        return self.won or len(self._points) > self._family.max_commands

    @property
    def _ending(self) -> str:
        if self._terse:
            return "won" if self.won else "over"
        return "You have won. The game is over." if self.won else "No commands are left. The game is over."

    @property
    def _standing(self) -> str:
        commands = "; ".join(self.admissible_commands)
        return f"Score: {self._points[-1]} of {self._now['max_score']}. Possible commands: {commands}."


def _prose(text: str) -> str:
    """Return what the game says without its prompt, its status line and blank lines.

    >>> _prose("\\n-= Hall =-\\nYou are here.\\n\\n\\n>                 -= Hall =-0/1")
    '-= Hall =-\\nYou are here.'
    """
    text = text.partition("\n>")[0].partition("*** The End ***")[0]
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def _tiny_words(facts: Sequence[Proposition], commands: Sequence[str]) -> str:
    """Return the room, what stands and lies in it, and the commands: "attic bench cup . go east , take cup"."""
    places = {fact.names[0]: fact.names[1] for fact in facts if fact.name == "at"}
    room = places.pop("P")
    here = sorted(thing for thing, place in places.items() if place == room)
    return f"{' '.join([room, *here])} . {' , '.join(commands)}"


def cache_folder() -> Path:
    """Return the folder of the games made so far: peft-onelayer/textworld in $XDG_CACHE_HOME (default: ~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(home) / "peft-onelayer" / "textworld"


def _folder_to_write_in() -> Path:
    """The cache folder; where it cannot be written, such as in a container, a temporary one of this process."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # root is not told by permissions that a file system is read-only
            return folder
    except OSError:
        return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="onelayer-textworld-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def game_file(family: Family, split: str, seed: int) -> Path:
    """Return the file of a game; it is made first if it is not in the cache.

    Several processes may ask for the same game at once: each makes it in a folder of its own, and the first that is
    done moves it to its place.

    Raises:
        ValueError: for an unknown split.
    """
    from textworld.generator import compile_game

    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    version = f"{family.name or 'default'}-{CACHE_VERSION}-{importlib.metadata.version('textworld')}"
    within = Path(version, f"{split}-{seed}", f"game{family.suffix}")
    path = cache_folder() / within
    if not path.exists():
        path = _folder_to_write_in() / within
    folder = path.parent
    if not path.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            game = draw_game(family, split, seed)
            game.save(str(made / "game.json"))
            if family.suffix == ".z8":
                options = _options(seed)
                options.path, options.force_recompile = str(made / "game.z8"), True
                with _home_to_write_in(scratch):
                    compile_game(game, options)
            try:
                made.rename(folder)
            except OSError:  # not empty: another process was faster
                if not path.exists():
                    raise
    return path


@contextmanager
def _home_to_write_in(scratch: str) -> Iterator[None]:
    """Give the compiler, which keeps files of its own at home, another home where that cannot be written."""
    home = os.environ.get("HOME")
    if home and os.access(home, os.W_OK):
        yield
        return
    os.environ["HOME"] = scratch
    try:
        yield
    finally:
        if home is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = home


def draw_game(family: Family, split: str, seed: int) -> Game:
    """Make the game of a seed: the first of the seed's draws whose content belongs to the split."""
    from textworld.generator import QuestGenerationError

    rng = random.Random(f"{split} {seed}")
    while True:
        try:
            game = family.make(rng.randrange(2**32))
        except QuestGenerationError:  # this map has no place for the quest
            continue
        held_out = hashlib.sha256(game_content(game).encode()).digest()[0] % HELD_OUT == 0
        if held_out == (split == "test"):
            return game


def game_content(game: Game) -> str:
    """Return what makes a game the game it is: its facts at the start and those that win, by their names, sorted."""
    from textworld.generator.inform7 import Inform7Game

    named = Inform7Game(game).get_human_readable_fact
    start = sorted(str(named(fact)) for fact in game.world.facts)
    wins = [
        sorted(str(named(fact)) for fact in event.condition.preconditions)
        for quest in game.quests
        for event in quest.win_events
    ]
    return f"{start} -> {sorted(wins)}"


def _options(seed: int) -> GameOptions:
    from textworld import GameOptions
    from textworld.generator import KnowledgeBase

    options = GameOptions()
    options.kb = KnowledgeBase.default()  # the one that is loaded already; a new one takes half a second
    options.seeds = seed
    return options


def make_default_game(seed: int) -> Game:
    """Make a game of `textworld.generator.make_game`: 4 rooms, 8 objects, a quest of 4 commands."""
    from textworld.generator import make_game

    options = _options(seed)
    options.nb_rooms, options.nb_objects = 4, 8
    options.quest_length = 4
    options.grammar.only_last_action = True  # otherwise the objective is the walkthrough
    return make_game(options)


def make_tiny_game(seed: int) -> Game:
    """Make a game of the tiny family: an object has to be put where it belongs, in 3 to 5 commands."""
    rng = random.Random(seed)
    while True:
        game = _tiny_draw(rng)
        if 3 <= len(game.walkthrough) <= 5:
            return game


def _tiny_draw(rng: random.Random) -> Game:
    from textworld import GameMaker
    from textworld.generator.game import Event, GameProgression, Quest
    from textworld.generator.inform7 import Inform7Game

    maker = GameMaker(_options(rng.randrange(2**32)))
    rooms = [maker.new_room(name) for name in rng.sample(TINY_ROOMS, 3)]
    first, last = rng.sample(sorted(OPPOSITE), 2)  # where the outer rooms lie, seen from the one in the middle
    way = {(1, 0): first, (0, 1): OPPOSITE[first], (1, 2): last, (2, 1): OPPOSITE[last]}
    maker.connect(rooms[1].exits[first], rooms[0].exits[OPPOSITE[first]])
    maker.connect(rooms[1].exits[last], rooms[2].exits[OPPOSITE[last]])
    player = rng.randrange(3)
    maker.set_player(rooms[player])

    container = maker.new("c", rng.choice(TINY_CONTAINERS))
    supporter = maker.new("s", rng.choice(TINY_SUPPORTERS))
    container.add_property(rng.choice(("open", "closed")))
    room_of = {container: rng.randrange(3), supporter: rng.randrange(3)}
    for receptacle, room in room_of.items():
        rooms[room].add(receptacle)

    # The wanted object lies on the floor or in the receptacle that it does not belong into.
    wanted, other = (maker.new("o", name) for name in rng.sample(TINY_OBJECTS, 2))
    target, elsewhere = rng.sample((container, supporter), 2)
    source_room = rng.randrange(3) if rng.random() < 0.5 else None
    source = elsewhere if source_room is None else rooms[source_room]
    source.add(wanted)
    rng.choice((*rooms, container, supporter)).add(other)

    def walk(start: int, end: int) -> list[str]:
        if start == end:
            return []
        step = end if 1 in (start, end) else 1
        return [f"go {way[start, step]}", *walk(step, end)]

    take_at = room_of[elsewhere] if source_room is None else source_room
    opening = [f"open {container.name}"] if container.has_property("closed") else []
    plan = walk(player, take_at)
    plan += opening if source is container else []
    plan += [f"take {wanted.name}" + (f" from {source.name}" if source is elsewhere else "")]
    plan += walk(take_at, room_of[target])
    plan += opening if target is container else []
    plan += [
        f"insert {wanted.name} into {target.name}" if target is container else f"put {wanted.name} on {target.name}"
    ]

    # With the actions of the plan TextWorld can track what is left to do.
    game = maker.build()
    progression = GameProgression(game, track_quests=False)
    actions: list[Action] = []
    for command in plan:
        commands = Inform7Game(game).gen_commands_from_actions(progression.valid_actions)
        actions.append(progression.valid_actions[commands.index(command)])
        progression.update(actions[-1])
    goal = maker.new_fact("in" if target is container else "on", wanted, target)
    maker.quests = [Quest(win_events=[Event(actions=actions, conditions=[goal], commands=plan)])]
    game = maker.build()
    game.objective = plan[-1]
    game.metadata["walkthrough"] = plan
    return game


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "",
            make_default_game,
            ".z8",
            ({"role": "system", "content": SYSTEM}, {"role": "user", "content": ""}),
            20,
            4096,
        ),
        Family("tiny", make_tiny_game, ".json", ({"role": "user", "content": ""},), 8, 320),
    )
}


def rows(family: Family, split: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return `n` games of a split, as their seeds; no game is made yet.

    Raises:
        ValueError: for an unknown split, n < 1, or more than the 125,000 test seeds.
    """
    return [
        {"prompt": [dict(message) for message in family.prompt], "split": split, "seed": number}
        for number in draw_problems(split, n, seed, space=SEEDS)
    ]


def textworld_reward(
    prompts: Sequence[Any], completions: Sequence[Any], environments: Sequence[TextWorldEnvironment], **kwargs: Any
) -> list[float]:
    """Reward the points of an episode over those of its game, in TRL's signature: 1 when it is won, 0 without any.

    Args:
        prompts: not used.
        completions: not used; what was said without calling `act` has no effect.
        environments: those that the completions were played in, as TRL passes them.
        kwargs: the columns and what the trainer adds; not used.
    """
    return [environment.score for environment in environments]


def load(argument: str = "") -> Task:
    """Return the task with one family of games.

    Args:
        argument: "" or "tiny".

    Raises:
        ValueError: for another argument, or without the package textworld.
    """
    if argument not in FAMILIES:
        raise ValueError(f"task 'textworld:{argument}' is not known; expected 'textworld' or 'textworld:tiny'")
    if importlib.util.find_spec("textworld") is None:
        raise ValueError("task 'textworld' needs the package textworld; run: pip install 'peft-onelayer[tasks]'")
    family = FAMILIES[argument]
    return Task(
        name=f"textworld:{argument}" if argument else "textworld",
        rows=functools.partial(rows, family),
        reward=textworld_reward,
        max_completion_tokens=family.max_completion_tokens,
        environment_factory=functools.partial(TextWorldEnvironment, family),
        data={"textworld": importlib.metadata.version("textworld"), "games": str(CACHE_VERSION)},
    )
