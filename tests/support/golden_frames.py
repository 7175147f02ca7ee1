"""Replication frames as a PostgreSQL 18.6 server sent them (whole CopyData), with what they say.

The schema was::

    CREATE DOMAIN mood AS int4;
    CREATE TABLE "sch é".t (id int4 PRIMARY KEY, name text, acl aclitem, big text, m mood);
    CREATE TABLE f (id int4 PRIMARY KEY, a text);
    ALTER TABLE f REPLICA IDENTITY FULL;
    CREATE PUBLICATION p FOR ALL TABLES;

Frames of one transcript are in the order they came, which matters inside stream blocks;
repetitions are left out.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from cdc_sync.pgoutput.messages import (
    Begin,
    BeginPrepare,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Prepare,
    Relation,
    RelationColumn,
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdc_sync.rows import UNCHANGED, TextValue

Transcript: TypeAlias = tuple[tuple[bytes, Message], ...]

#: A keepalive of that server: 0/17396C8, no reply requested.
KEEPALIVE_FRAME: Final = bytes.fromhex("6b00000000017396c8000303e14123335900")

#: Protocol 1, ``binary 'true'``, ``messages 'true'``; one Begin and one Commit.
#:
#:     INSERT INTO "sch é".t VALUES (1, 'ä', 'postgres=r/postgres', NULL, 7);
#:     -- after a row 2 whose "big" is TOASTed (its frame is left out, being long):
#:     UPDATE "sch é".t SET name = 'b' WHERE id = 2;
#:     UPDATE "sch é".t SET id = 3 WHERE id = 2;
#:     DELETE FROM "sch é".t WHERE id = 1;
#:     INSERT INTO f VALUES (1, 'x'); UPDATE f SET a = 'y'; DELETE FROM f;
#:     TRUNCATE f, "sch é".t RESTART IDENTITY CASCADE;
#:     SELECT pg_logical_emit_message(true, 'cdc_sync', 'hi');
#:     SELECT pg_logical_emit_message(false, 'cdc_sync', '');
#:     -- in a session with replication origin "other", at 0/AABBCC:
#:     INSERT INTO f VALUES (9, 'o');
PLAIN: Final[Transcript] = (
    (
        bytes.fromhex(
            "7700000000017397000000000001739700000303e1412335194200000000017397f8000303e14122eb4b"
            "000002f1"
        ),
        Begin(final_lsn=24352760, commit_time=848690925464395, xid=753),
    ),
    (
        bytes.fromhex("7700000000000000000000000000000000000303e14123353c590000400200696e743400"),
        Type(oid=16386, namespace="", name="int4", xid=None),
    ),
    (
        bytes.fromhex(
            "7700000000000000000000000000000000000303e141233581520000400373636820c3a9007400640005"
            "0169640000000017ffffffff006e616d650000000019ffffffff0061636c0000000409ffffffff006269"
            "670000000019ffffffff006d0000004002ffffffff"
        ),
        Relation(
            oid=16387,
            namespace="sch é",
            name="t",
            replica_identity="d",
            columns=(
                RelationColumn(name="id", type_oid=23, type_modifier=-1, key=True),
                RelationColumn(name="name", type_oid=25, type_modifier=-1, key=False),
                RelationColumn(name="acl", type_oid=1033, type_modifier=-1, key=False),
                RelationColumn(name="big", type_oid=25, type_modifier=-1, key=False),
                RelationColumn(name="m", type_oid=16386, type_modifier=-1, key=False),
            ),
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "7700000000017397000000000001739700000303e14123359049000040034e0005620000000400000001"
            "6200000002c3a47400000013706f7374677265733d722f706f7374677265736e620000000400000007"
        ),
        Insert(
            relation=16387,
            new=[
                b"\x00\x00\x00\x01",
                b"\xc3\xa4",
                TextValue(b"postgres=r/postgres"),
                None,
                b"\x00\x00\x00\x07",
            ],
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "7700000000017398280000000001739828000303e141233594430000000000017397f800000000017398"
            "28000303e14122eb4b"
        ),
        Commit(flags=0, commit_lsn=24352760, end_lsn=24352808, commit_time=848690925464395),
    ),
    (
        bytes.fromhex(
            "77000000000173a720000000000173a720000303e1412335e755000040034e0005620000000400000002"
            "6200000001626e756e"
        ),
        Update(
            relation=16387,
            old=None,
            old_is_key=False,
            new=[b"\x00\x00\x00\x02", b"b", None, UNCHANGED, None],
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173a7e8000000000173a7e8000303e1412335f055000040034b0005620000000400000002"
            "6e6e6e6e4e00056200000004000000036200000001626e756e"
        ),
        Update(
            relation=16387,
            old=[b"\x00\x00\x00\x02", None, None, None, None],
            old_is_key=True,
            new=[b"\x00\x00\x00\x03", b"b", None, UNCHANGED, None],
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173a8c0000000000173a8c0000303e14123362244000040034b0005620000000400000001"
            "6e6e6e6e"
        ),
        Delete(
            relation=16387,
            old=[b"\x00\x00\x00\x01", None, None, None, None],
            old_is_key=True,
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "7700000000000000000000000000000000000303e14123365c520000400b7075626c6963006600660002"
            "0169640000000017ffffffff01610000000019ffffffff"
        ),
        Relation(
            oid=16395,
            namespace="public",
            name="f",
            replica_identity="f",
            columns=(
                RelationColumn(name="id", type_oid=23, type_modifier=-1, key=True),
                RelationColumn(name="a", type_oid=25, type_modifier=-1, key=True),
            ),
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173a930000000000173a930000303e14123365e490000400b4e0002620000000400000001"
            "620000000178"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\x01", b"x"], xid=None),
    ),
    (
        bytes.fromhex(
            "77000000000173aa40000000000173aa40000303e141233667550000400b4f0002620000000400000001"
            "6200000001784e0002620000000400000001620000000179"
        ),
        Update(
            relation=16395,
            old=[b"\x00\x00\x00\x01", b"x"],
            old_is_key=False,
            new=[b"\x00\x00\x00\x01", b"y"],
            xid=None,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173aac8000000000173aac8000303e14123366f440000400b4f0002620000000400000001"
            "620000000179"
        ),
        Delete(relation=16395, old=[b"\x00\x00\x00\x01", b"y"], old_is_key=False, xid=None),
    ),
    (
        bytes.fromhex(
            "77000000000173c1f8000000000173c1f8000303e1412336f95400000002030000400b00004003"
        ),
        Truncate(cascade=True, restart_identity=True, relations=(16395, 16387), xid=None),
    ),
    (
        bytes.fromhex(
            "77000000000173c508000000000173c508000303e1412337124d01000000000173c5086364635f73796e"
            "6300000000026869"
        ),
        LogicalMessage(
            transactional=True, lsn=24364296, prefix="cdc_sync", content=b"hi", xid=None
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173c578000000000173c578000303e1412337174d00000000000173c5786364635f73796e"
            "630000000000"
        ),
        LogicalMessage(transactional=False, lsn=24364408, prefix="cdc_sync", content=b"", xid=None),
    ),
    (
        bytes.fromhex(
            "77000000000173c7d8000000000173c7d8000303e1412337434f0000000000aabbcc6f7468657200"
        ),
        Origin(lsn=11189196, name="other"),
    ),
    (
        bytes.fromhex(
            "77000000000173c7d8000000000173c7d8000303e141233747490000400b4e0002620000000400000009"
            "62000000016f"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\t", b"o"], xid=None),
    ),
)

#: Protocol 4, ``streaming 'parallel'``,
#: ``debug_logical_replication_streaming = immediate``; blocks without changes left out.
#:
#:     BEGIN; INSERT INTO f VALUES (11, 'x');
#:     SAVEPOINT s; INSERT INTO f VALUES (12, 'y'); ROLLBACK TO s;
#:     UPDATE f SET a = 'z' WHERE id = 11; DELETE FROM f WHERE id = 9; TRUNCATE f;
#:     SELECT pg_logical_emit_message(true, 'cdc_sync', 'm'); COMMIT;
STREAMED_PARALLEL: Final[Transcript] = (
    (
        bytes.fromhex("77000000000173c938000000000173c938000303e1413d75e653000002fd01"),
        StreamStart(xid=765, first_segment=True),
    ),
    (
        bytes.fromhex(
            "7700000000000000000000000000000000000303e1413d770252000002fd0000400b7075626c69630066"
            "006600020169640000000017ffffffff01610000000019ffffffff"
        ),
        Relation(
            oid=16395,
            namespace="public",
            name="f",
            replica_identity="f",
            columns=(
                RelationColumn(name="id", type_oid=23, type_modifier=-1, key=True),
                RelationColumn(name="a", type_oid=25, type_modifier=-1, key=True),
            ),
            xid=765,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173c938000000000173c938000303e1413d773949000002fd0000400b4e00026200000004"
            "0000000b620000000178"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\x0b", b"x"], xid=765),
    ),
    (
        bytes.fromhex("77000000000173c938000000000173c938000303e1413d774745"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173c9b8000000000173c9b8000303e1413d776453000002fd00"),
        StreamStart(xid=765, first_segment=False),
    ),
    (
        bytes.fromhex(
            "77000000000173c9b8000000000173c9b8000303e1413d777049000002fe0000400b4e00026200000004"
            "0000000c620000000179"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\x0c", b"y"], xid=766),
    ),
    (
        bytes.fromhex("77000000000173c9b8000000000173c9b8000303e1413d777a45"),
        StreamStop(),
    ),
    (
        bytes.fromhex(
            "77000000000173ca68000000000173ca68000303e1413d778841000002fd000002fe000000000173ca68"
            "000303e1413d5738"
        ),
        StreamAbort(xid=765, subxid=766, abort_lsn=24365672, abort_time=848690927195960),
    ),
    (
        bytes.fromhex("77000000000173ca68000000000173ca68000303e1413d779653000002fd00"),
        StreamStart(xid=765, first_segment=False),
    ),
    (
        bytes.fromhex(
            "7700000000000000000000000000000000000303e1413d77a352000002ff0000400b7075626c69630066"
            "006600020169640000000017ffffffff01610000000019ffffffff"
        ),
        Relation(
            oid=16395,
            namespace="public",
            name="f",
            replica_identity="f",
            columns=(
                RelationColumn(name="id", type_oid=23, type_modifier=-1, key=True),
                RelationColumn(name="a", type_oid=25, type_modifier=-1, key=True),
            ),
            xid=767,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173ca68000000000173ca68000303e1413d77ae55000002ff0000400b4f00026200000004"
            "0000000b6200000001784e000262000000040000000b62000000017a"
        ),
        Update(
            relation=16395,
            old=[b"\x00\x00\x00\x0b", b"x"],
            old_is_key=False,
            new=[b"\x00\x00\x00\x0b", b"z"],
            xid=767,
        ),
    ),
    (
        bytes.fromhex("77000000000173ca68000000000173ca68000303e1413d77b945"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173cac8000000000173cac8000303e1413d77c653000002fd00"),
        StreamStart(xid=765, first_segment=False),
    ),
    (
        bytes.fromhex(
            "77000000000173cac8000000000173cac8000303e1413d77d144000002ff0000400b4f00026200000004"
            "0000000962000000016f"
        ),
        Delete(relation=16395, old=[b"\x00\x00\x00\t", b"o"], old_is_key=False, xid=767),
    ),
    (
        bytes.fromhex("77000000000173cac8000000000173cac8000303e1413d77dc45"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173d640000000000173d640000303e1413d793653000002fd00"),
        StreamStart(xid=765, first_segment=False),
    ),
    (
        bytes.fromhex(
            "77000000000173d640000000000173d640000303e1413d795654000002ff00000001000000400b"
        ),
        Truncate(cascade=False, restart_identity=False, relations=(16395,), xid=767),
    ),
    (
        bytes.fromhex("77000000000173d640000000000173d640000303e1413d795845"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173d6b0000000000173d6b0000303e1413d795e53000002fd00"),
        StreamStart(xid=765, first_segment=False),
    ),
    (
        bytes.fromhex(
            "77000000000173d6b0000000000173d6b0000303e1413d79614d000002fd01000000000173d6b0636463"
            "5f73796e6300000000016d"
        ),
        LogicalMessage(transactional=True, lsn=24368816, prefix="cdc_sync", content=b"m", xid=765),
    ),
    (
        bytes.fromhex("77000000000173d6b0000000000173d6b0000303e1413d796245"),
        StreamStop(),
    ),
    (
        bytes.fromhex(
            "77000000000173d828000000000173d828000303e1413d797463000002fd00000000000173d6b0000000"
            "000173d828000303e1413d6373"
        ),
        StreamCommit(
            xid=765, flags=0, commit_lsn=24368816, end_lsn=24369192, commit_time=848690927199091
        ),
    ),
)

#: Protocol 2, ``streaming 'on'``: StreamAbort has no LSN.
#:
#:     BEGIN; INSERT INTO f VALUES (31, 'x');
#:     SAVEPOINT s; INSERT INTO f VALUES (32, 'y'); ROLLBACK TO s; COMMIT;
STREAMED: Final[Transcript] = (
    (
        bytes.fromhex("77000000000173d860000000000173d860000303e14157a4a0530000030001"),
        StreamStart(xid=768, first_segment=True),
    ),
    (
        bytes.fromhex(
            "77000000000173d860000000000173d860000303e14157a60549000003000000400b4e00026200000004"
            "0000001f620000000178"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\x1f", b"x"], xid=768),
    ),
    (
        bytes.fromhex("77000000000173d860000000000173d860000303e14157a61445"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173d940000000000173d940000303e14157a634530000030000"),
        StreamStart(xid=768, first_segment=False),
    ),
    (
        bytes.fromhex(
            "77000000000173d940000000000173d940000303e14157a64049000003010000400b4e00026200000004"
            "00000020620000000179"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00 ", b"y"], xid=769),
    ),
    (
        bytes.fromhex("77000000000173d940000000000173d940000303e14157a64b45"),
        StreamStop(),
    ),
    (
        bytes.fromhex("77000000000173d9f0000000000173d9f0000303e14157a659410000030000000301"),
        StreamAbort(xid=768, subxid=769, abort_lsn=None, abort_time=None),
    ),
    (
        bytes.fromhex(
            "77000000000173da20000000000173da20000303e14157a66a630000030000000000000173d9f0000000"
            "000173da20000303e14157945f"
        ),
        StreamCommit(
            xid=768, flags=0, commit_lsn=24369648, end_lsn=24369696, commit_time=848690928915551
        ),
    ),
)

#: Protocol 3, ``two_phase 'true'``.
#:
#:     BEGIN; INSERT INTO f VALUES (21, 'x'); PREPARE TRANSACTION 'gid 1';
#:     COMMIT PREPARED 'gid 1';
#:     BEGIN; INSERT INTO f VALUES (22, 'x'); PREPARE TRANSACTION 'gid 2';
#:     ROLLBACK PREPARED 'gid 2';
TWO_PHASE: Final[Transcript] = (
    (
        bytes.fromhex(
            "77000000000173da58000000000173da58000303e14171d0ce62000000000173dad8000000000173dbd0"
            "000303e14171c0a800000302676964203100"
        ),
        BeginPrepare(
            prepare_lsn=24369880,
            end_lsn=24370128,
            prepare_time=848690930630824,
            xid=770,
            gid="gid 1",
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173da58000000000173da58000303e14171d204490000400b4e0002620000000400000015"
            "620000000178"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00\x15", b"x"], xid=None),
    ),
    (
        bytes.fromhex(
            "77000000000173dbd0000000000173dbd0000303e14171d2135000000000000173dad8000000000173db"
            "d0000303e14171c0a800000302676964203100"
        ),
        Prepare(
            flags=0,
            prepare_lsn=24369880,
            end_lsn=24370128,
            prepare_time=848690930630824,
            xid=770,
            gid="gid 1",
            streamed=False,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173dc08000000000173dc08000303e14171d22f4b00000000000173dbd0000000000173dc"
            "08000303e14171c16900000302676964203100"
        ),
        CommitPrepared(
            flags=0,
            commit_lsn=24370128,
            end_lsn=24370184,
            commit_time=848690930631017,
            xid=770,
            gid="gid 1",
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173dc08000000000173dc08000303e14171d23d62000000000173dc88000000000173dd80"
            "000303e14171c1e300000303676964203200"
        ),
        BeginPrepare(
            prepare_lsn=24370312,
            end_lsn=24370560,
            prepare_time=848690930631139,
            xid=771,
            gid="gid 2",
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173dd80000000000173dd80000303e14171d2535000000000000173dc88000000000173dd"
            "80000303e14171c1e300000303676964203200"
        ),
        Prepare(
            flags=0,
            prepare_lsn=24370312,
            end_lsn=24370560,
            prepare_time=848690930631139,
            xid=771,
            gid="gid 2",
            streamed=False,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173ddb8000000000173ddb8000303e14171d2607200000000000173dd80000000000173dd"
            "b8000303e14171c1e3000303e14171c22100000303676964203200"
        ),
        RollbackPrepared(
            flags=0,
            prepare_end_lsn=24370560,
            rollback_end_lsn=24370616,
            prepare_time=848690930631139,
            rollback_time=848690930631201,
            xid=771,
            gid="gid 2",
        ),
    ),
)

#: Protocol 4, ``streaming 'on'``, ``two_phase 'true'``.
#:
#:     BEGIN; INSERT INTO f VALUES (41, 'x'); PREPARE TRANSACTION 'gid 3'; COMMIT PREPARED 'gid 3';
STREAMED_TWO_PHASE: Final[Transcript] = (
    (
        bytes.fromhex("77000000000173ddf0000000000173ddf0000303e1418bfa40530000030401"),
        StreamStart(xid=772, first_segment=True),
    ),
    (
        bytes.fromhex(
            "77000000000173ddf0000000000173ddf0000303e1418bfb6d49000003040000400b4e00026200000004"
            "00000029620000000178"
        ),
        Insert(relation=16395, new=[b"\x00\x00\x00)", b"x"], xid=772),
    ),
    (
        bytes.fromhex("77000000000173ddf0000000000173ddf0000303e1418bfb7b45"),
        StreamStop(),
    ),
    (
        bytes.fromhex(
            "77000000000173df68000000000173df68000303e1418bfb9d7000000000000173de70000000000173df"
            "68000303e1418beaf300000304676964203300"
        ),
        Prepare(
            flags=0,
            prepare_lsn=24370800,
            end_lsn=24371048,
            prepare_time=848690932345587,
            xid=772,
            gid="gid 3",
            streamed=True,
        ),
    ),
    (
        bytes.fromhex(
            "77000000000173dfa0000000000173dfa0000303e1418bfbac4b00000000000173df68000000000173df"
            "a0000303e1418beb7800000304676964203300"
        ),
        CommitPrepared(
            flags=0,
            commit_lsn=24371048,
            end_lsn=24371104,
            commit_time=848690932345720,
            xid=772,
            gid="gid 3",
        ),
    ),
)

TRANSCRIPTS: Final[tuple[Transcript, ...]] = (
    PLAIN,
    STREAMED_PARALLEL,
    STREAMED,
    TWO_PHASE,
    STREAMED_TWO_PHASE,
)
