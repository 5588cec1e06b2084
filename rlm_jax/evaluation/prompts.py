"""From a problem to prompt ids, and from a chat template to the judge's question."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rlm_jax.reasoning.language_values import Judge
from rlm_jax.tasks.base import Problem, Task
from rlm_jax.text.chat import encode_chat, render_chat
from rlm_jax.text.tokenizer import Tokenizer

JUDGE_QUESTION = "Is the reasoning above correct so far? Answer Yes or No."


def encode_problem(tokenizer: Tokenizer, task: Task, problem: Problem) -> list[int]:
    """Prompt ids: the task's chat in the model's template; where it has none, the task's own
    notation, or plain text.

    Raises:
      ValueError: the question is empty.
    """
    if not problem.question.strip():
        raise ValueError("the question is empty")
    messages = task.prompt(problem)
    if tokenizer.chat_template is not None:
        return encode_chat(tokenizer, messages, add_generation_prompt=True)
    if task.notation is not None:
        text = task.notation(problem) + "\n"
        return tokenizer.encode(text, add_bos=tokenizer.bos_id is not None)
    turns = "\n".join(message["content"] for message in messages)
    return tokenizer.encode(turns + "\n", add_bos=tokenizer.bos_id is not None)


def make_judge(tokenizer: Tokenizer, question: str = JUDGE_QUESTION) -> Judge:
    """The ids that ask the policy about its own reasoning, for evaluator "p_yes".

    The question is a user turn behind the unfinished assistant turn; behind a finished one the
    end-of-turn token is there already and is left out.

    Raises:
      ValueError: no single token of the vocabulary says yes, or none says no.
    """
    suffix = _judge_suffix(tokenizer, question)
    finished = suffix[1:] if suffix[0] in tokenizer.eos_ids else suffix
    yes, no = (_word_ids(tokenizer, word) for word in ("yes", "no"))
    if not yes or not no:
        raise ValueError(
            "evaluator 'p_yes' needs single tokens for yes and no; this vocabulary "
            f"has {len(yes)} and {len(no)}"
        )
    padded = finished + [0] * (len(suffix) - len(finished))
    return Judge(
        unfinished=jnp.asarray(suffix, jnp.int32),
        finished=jnp.asarray(padded, jnp.int32),
        unfinished_length=jnp.int32(len(suffix)),
        finished_length=jnp.int32(len(finished)),
        yes_ids=jnp.asarray(yes, jnp.int32),
        no_ids=jnp.asarray(no, jnp.int32),
    )


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded prompts [B, width] and their lengths [B], int32."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def _judge_suffix(tokenizer: Tokenizer, question: str) -> list[int]:
    """What follows an assistant's words when a user asks `question` next."""
    template = tokenizer.chat_template
    if template is not None:
        first = [{"role": "user", "content": "Q"}]
        more = [{"role": "assistant", "content": "A"}, {"role": "user", "content": question}]
        before = render_chat(template, first, add_generation_prompt=True) + "A"
        whole = render_chat(template, first + more, add_generation_prompt=True)
        if whole.startswith(before):
            return tokenizer.encode(whole[len(before) :], allow_special=True)
    return tokenizer.encode(f"\n\n{question}\n")


def _word_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """Tokens that are exactly this word, whatever its case and leading space."""
    spellings = [form for base in (word, word.capitalize()) for form in (base, " " + base)]
    encoded = [tokenizer.encode(form) for form in spellings]
    return sorted({ids[0] for ids in encoded if len(ids) == 1})
