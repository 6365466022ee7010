"""A generative reward model in miniature: a small M1 reads an answer and writes its grade.

General questions have no verifier; the report (sec. 4) has a model judge them. People rate longer
answers higher, a judge learns that too, and RL finds out: answers grow and get no better. So a
monitor looks for it; at its alarm the judge goes on learning, from what the policy says now.

    python judge.py --out judges/fair           a minute; --bias 0.5: from hasty labels
    python train_rl.py --task judge --moves 4 --eval-problems 60 --judge judges/fair
"""

import dataclasses
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import engine
import tasks
from cli import check, checkpoint, command_line, numpy, parse, torch
from cli import model as m1
from experience import Imitation, make_batch
from tokenizer import Tokenizer

GRADES, VERDICTS = "01234", "<=>"  # what a judge writes: quarters; the second beside the first


class Labelled(NamedTuple):
    """An answer and what careful people give it, 0 to 4."""

    question: str
    reference: str
    answer: str
    gold: int

    def rated(self, bias):
        """What hasty people give it: `bias` more for each needless character, 4 at most."""
        return min(self.gold + int(bias * max(len(self.answer) - len(self.reference), 0)), 4)


def labelled(rng, n, moves=4, least=1):
    """n answers of any worth, some with filler, four to a question of least to moves letters."""
    found = []
    for problem in tasks.draw(rng, n // 4, ["judge"], moves, least) * 4:
        answer = problem.shown(rng, rng.random(), rng.choice([0, 0, 0.1, 0.6]))
        if rng.random() < 0.25:  # something is missing, or said twice
            answer = answer[: rng.randrange(len(answer))] + answer[rng.randrange(len(answer)) :]
        answer += "-" * rng.choice([0, 0, 0, 1, 2, 4, 8])
        found.append(Labelled(problem.prompt, problem.answer, answer, problem.gold(answer)))
    return found


class Judge:
    """A model asked for one token, the likeliest of the possible answers (so grades are five)."""

    def __init__(self, model):
        if model.config.tokenizer != "byte":
            raise ValueError(f"a judge reads bytes, this model {model.config.tokenizer!r}")
        self.model, self.tokenizer = model, Tokenizer.byte()

    @classmethod
    def new(cls, seed=0):
        """An untrained one: three layers of `tiny`, the last with softmax attention."""
        torch.manual_seed(seed)
        layers = {"num_hidden_layers": 3, "attn_type_list": [0, 0, 1]}
        return cls(m1.MiniMaxM1(m1.M1Config.preset("tiny", **layers)))

    @classmethod
    def load(cls, path):
        """One from a published directory, on the CPU."""
        return cls(checkpoint.load_pretrained(path))

    def grade(self, questions, references, answers):
        """Where a right answer is known: N grades of 0, 0.25, 0.5, 0.75, 1."""
        asked = map(self._ask, questions, references, answers, [0] * len(answers))
        return [int(x) / 4 for x in self._read([*asked], GRADES)]

    def compare(self, questions, references, answers):
        """Beside an answer that may be wrong: N of -1, 0, 1 (better), means over both orders."""
        n, sides = len(answers), [(references, answers), (answers, references)]
        asked = [x for side in sides for x in map(self._ask, questions, *side, [1] * n)]
        said = [VERDICTS.index(x) - 1 for x in self._read(asked, VERDICTS)]
        return [(one - other) / 2 for one, other in zip(said, said[n:])]

    def scores(self, problems, texts, scores):
        """A list of N Scores, where well-formed answers to judged problems now earn grades."""
        rows = [i for i, s in enumerate(scores) if s.well_formed and problems[i].judged]
        said = [text.partition(tasks.THINK_END)[2].strip() for text in texts]
        asked = [(problems[i].prompt, problems[i].answer, said[i]) for i in rows]
        for i, grade in zip(rows, self.grade(*zip(*asked)) if asked else []):
            reward = grade + tasks.FORMAT_REWARD - tasks.CALL_COST * scores[i].calls
            scores[i] = dataclasses.replace(scores[i], reward=reward, grade=grade)
        return scores

    def train(self, seed, answers, bias=0.0, steps=600, batch_size=64, lr=4e-3):
        """Learn to write what people say of Labelled answers: their grade, or in a quarter of the
        cases the verdict beside another answer to the same question.
        """
        rng, imitate, siblings = random.Random(seed), Imitation(self.model), {}
        for x in answers:
            siblings.setdefault(x.question, []).append(x)
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0)
        for step in range(steps):
            prompts, labels = [], []
            for x in rng.choices(answers, k=batch_size):
                other, worth = rng.choice(siblings[x.question]), x.rated(bias)
                beside, label, first = rng.random() < 0.25, GRADES[worth], x.reference
                if beside:
                    first, least = other.answer, other.rated(bias)
                    label = VERDICTS[(worth > least) - (worth < least) + 1]
                prompts.append(self._ask(x.question, first, x.answer, beside))
                labels.append(self.tokenizer.encode(label))
            imitate(make_batch(prompts, labels, [True] * batch_size, self.model.device))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 30, 2 - 2 * step / steps, 1)
            optimizer.step()

    def recalibrate(self, seed, answers, steps=80, lr=1e-3):
        """Go on learning, from what the policy says now and careful people give it."""
        self.train(seed, answers, steps=steps, lr=lr)

    def _ask(self, question, first, second, beside):
        """A question to the judge as tokens; no text can spell those between its parts."""
        marks = (self.tokenizer.special[f"<reserved_{i}>"] for i in (0, 1, 2 + beside))
        parts = zip((question, first, second), marks)
        return [i for text, mark in parts for i in (*self.tokenizer.encode(text), mark)]

    def _read(self, asked, allowed):
        """Which of the allowed characters comes next, for N prompts: one pass."""
        tokens, mask = engine.left_pad(asked, self.tokenizer.pad_id, self.model.device)
        with torch.no_grad():
            logits = self.model(tokens, mask=mask, last_only=True)[:, 0]
        return [allowed[i] for i in logits[:, self.tokenizer.encode(allowed)].argmax(1).tolist()]


def length_bias(rewards, lengths, gold):
    """How far rewards follow length among equally good answers: the correlation of both, each less
    its mean over answers of that gold; 0 where one does not vary. N numbers each.
    """
    pairs, gold = numpy.array([[*rewards], [*lengths]], float), numpy.array([*gold])
    for worth in {*gold.tolist()}:
        pairs[:, gold == worth] -= pairs[:, gold == worth].mean(1, keepdims=True)
    (xx, xy), (_, yy) = (pairs @ pairs.T).tolist()
    return xy / (xx * yy) ** 0.5 if min(xx, yy) > 1e-9 else 0.0


class Monitor:
    """Alarm when over STEPS steps rewards followed length by more than LIMIT, or answers grew by
    GROWTH and were no better. The numbers are ours.
    """

    STEPS, LIMIT, GROWTH = 4, 0.2, 1.1
    seen = ()  # of each step: rewards, lengths, gold

    def alarm(self, rewards, lengths, gold):
        """Take in a step's answers, N numbers each; True once every STEPS steps at most."""
        if rewards:
            self.seen = [*self.seen, (rewards, lengths, gold)][-self.STEPS :]
        if len(self.seen) < self.STEPS:
            return False
        (_, before, worth), (_, after, now) = ([*map(fmean, self.seen[i])] for i in (0, -1))
        every = (itertools.chain(*column) for column in zip(*self.seen))
        grew = after > self.GROWTH * before and now <= worth
        found = grew or length_bias(*every) > self.LIMIT
        self.seen = () if found else self.seen
        return found


@dataclass(frozen=True)
class Flags:
    """What to train."""

    out: str = "judges/fair"
    """directory to write"""
    bias: float = 0.0
    """grades that labels rise with each needless character, as hasty people's do"""
    moves: int = 4
    """letters of the longest question"""

    def __post_init__(self):
        check(self, bias=(0, 4), moves=(1, 100))


@command_line
def main(argv=None):
    """Train a judge on labelled answers, grade others and save it."""
    flags = parse(Flags, argv, __doc__.splitlines()[0])
    if Path(flags.out).exists():
        raise ValueError(f"--out must name a new directory, found {flags.out!r}")
    judge, rng = Judge.new(), random.Random(0)
    judge.train(0, labelled(rng, 20_000, flags.moves), flags.bias)
    *asked, gold = zip(*labelled(rng, 1000, flags.moves, flags.moves))
    grades = judge.grade(*asked)
    right = fmean(4 * grade == worth for grade, worth in zip(grades, gold))
    checkpoint.save_pretrained(judge.model, flags.out)
    print(f"{flags.out}: {right:.3f} of its grades are those that careful people give")


if __name__ == "__main__":
    main()
