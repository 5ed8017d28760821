"""When a stage that asks an endpoint goes on without a reply, and when it stops so that the same command can go on later.

A question that gets no reply is a None where the server works otherwise: a refusal (a Failure that is final) shows that it
can be reached, a reply to another question that it can be used. It stops the stage where nothing shows that:
- MAX_FAILURES calls in a row don't get through;
- at the end of a shard, none of the questions that it asked got a reply, and the stage has no reply from before either, or this
  process has heard nothing of the server yet, or they are of MAX_FAILURES prompts (credit that has run out is a refusal too).

Questions that were asked in vain in MAX_TRIED processes stop nothing more, so that every stage ends: some always take longer
than `timeout`. But a stage to which the server never said a word is not done.

A server that goes down less than MAX_FAILURES calls before the end of a shard can't be told from questions without a reply.
"""

from collections.abc import Mapping

from selfplay.judges.journal import Failure, Journal, Reply

MAX_FAILURES = 8  # calls, each after all its retries; at the end of a shard, prompts
MAX_TRIED = 3


class Patience:
    """What is known of a stage's questions, by their digests, earlier processes included, and whether to go on."""

    def __init__(self, journal: Journal) -> None:
        """A refusal of an earlier process is asked again where it was perhaps not about its question: there is no reply at
        all, or it is among the last MAX_FAILURES or more lines that are nothing but refusals.
        """
        self.journal = journal
        many = len(journal.refused_last) >= MAX_FAILURES
        doubtful = journal.refused_last if many or not journal.replies else set[str]()
        self._failed = {
            key: failure
            for key, failure in journal.refused.items()
            if key not in doubtful or journal.tried[key] >= MAX_TRIED
        }
        self._heard = False  # by this process, a reply or a refusal
        self._in_row = 0

    def known(self, key: str) -> Reply | Failure | None:
        """What a question got; None where it is to be asked."""
        return self.journal.replies.get(key) or self._failed.get(key)

    def add(self, key: str, found: Reply | Failure) -> str | None:
        """Keeps what a question got. A reason where the stage must stop."""
        self.journal.add(key, found)
        if isinstance(found, Failure):
            self._failed[key] = found
        if isinstance(found, Reply) or found.final:
            self._heard = True
            self._in_row = 0
            return None
        self._in_row += self.journal.tried[key] < MAX_TRIED
        if self._in_row < MAX_FAILURES:
            return None
        return f"{self._in_row} calls in a row got no reply; the last: {found.reason}"

    def at_end(self, asked: Mapping[str, str]) -> str | None:
        """A reason to stop at the end of a shard; `asked` are the questions that it asked of the server, with their prompts."""
        failed = [self._failed[key] for key in asked if key in self._failed]
        if not asked or len(failed) < len(asked):
            return None
        journal = self.journal
        if journal.replies and self._heard and len(set(asked.values())) < MAX_FAILURES:
            return None
        if (journal.replies or journal.refused) and all(journal.tried[key] >= MAX_TRIED for key in asked):
            return None
        return f"none of {len(asked)} calls got a reply that can be used; the first: {failed[0].reason}"
