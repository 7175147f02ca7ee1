"""Aliases of a server's collections: other names by which readers find them."""

from __future__ import annotations

from typing import Final

from qdrant_client import grpc as q

from cdc_sync.qdrant.rpc import LIST_ALIASES, UPDATE_ALIASES, Rpc

_TARGET: Final = "the aliases"


class Aliases:
    """The aliases of a server. Errors are SinkErrors."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def all(self) -> dict[str, str]:
        """The collection of each alias."""
        request = q.ListAliasesRequest().SerializeToString()
        answer = await self._rpc.request(LIST_ALIASES, request, _TARGET)
        return {one.alias_name: one.collection_name for one in answer.aliases}

    async def point(self, alias: str, collection: str) -> None:
        """Have the alias stand for a collection, which exists; one that stands for another is moved
        without a moment in between at which there is none.

        Source: Qdrant, ``storage/src/content_manager/toc/collection_meta_ops.rs``: CreateAlias on
        an alias that exists replaces it.
        """
        create = q.CreateAlias(alias_name=alias, collection_name=collection)
        await self._change(q.AliasOperations(create_alias=create))

    async def remove(self, alias: str) -> None:
        """Remove an alias, present or not."""
        await self._change(q.AliasOperations(delete_alias=q.DeleteAlias(alias_name=alias)))

    async def _change(self, action: q.AliasOperations) -> None:
        request = q.ChangeAliases(actions=[action]).SerializeToString()
        await self._rpc.request(UPDATE_ALIASES, request, _TARGET)
