"""Which transactions have been applied lately, and whether a snapshot shows all of them."""

from __future__ import annotations

from cdc_sync.postgres.refetch import widen_xid

#: Applied transactions kept by their ids, at the most: some 8 MB.
_MOST_TRANSACTIONS = 100_000


class RecentTransactions:
    """The transactions applied lately, by the 32-bit ids that the stream gives.

    Those that a snapshot has shown are forgotten: every later one shows them too. Should there be
    too many to keep, everything up to the newest counts as possibly applied (R74).
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._applied: set[int] = set()
        #: A 64-bit id that is not far from those of the present.
        self._near = horizon

    def __len__(self) -> int:
        return len(self._applied)

    def raise_horizon(self, horizon: int) -> None:
        """Take every transaction below as possibly applied."""
        self._horizon = max(self._horizon, horizon)

    @property
    def horizon(self) -> int:
        """A 64-bit id: of the transactions below, which are applied is not known."""
        return self._horizon

    def pending(self) -> frozenset[int]:
        """The 32-bit ids of transactions applied that are not known to be visible everywhere."""
        return frozenset(self._applied)

    def add(self, xid: int) -> None:
        """A transaction has been applied, in part or as a whole."""
        self._applied.add(xid)
        if len(self._applied) > _MOST_TRANSACTIONS:
            self.raise_horizon(max(widen_xid(xid, self._near) for xid in self._applied) + 1)
            self._near = self._horizon
            self._applied.clear()

    def all_visible(self, xmin: int, xmax: int, running: frozenset[int]) -> bool:
        """Whether everything applied is visible in the snapshot (64-bit ids)."""
        self.forget(xmin, xmax, running)
        return xmin >= self._horizon and not self._applied

    def forget(self, xmin: int, xmax: int, running: frozenset[int]) -> None:
        """Forget the transactions that are visible in a snapshot (64-bit ids), and so in every
        later one."""
        self._near = max(self._near, xmax)
        invisible = set()
        for xid32 in self._applied:
            xid = widen_xid(xid32, xmax)
            if xid >= xmin and (xid >= xmax or xid in running):
                invisible.add(xid32)
        self._applied = invisible
