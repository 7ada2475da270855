"""What summaries are told from: the texts of their assets' other spans, once these are in the ledger.

A summary is a span like any other, planned and counted with the rest, and done when they are.
"""

from __future__ import annotations

import duckdb

from operators.tracks import FRAMES, SUMMARY
from pipeline import ledger

SUMMARIES = "summaries"


def tell(db: duckdb.DuckDBPyConnection) -> None:
    """Make `summaries`: the summaries of `todo`, with what they are about in place of the variables.

    That is a JSON object: captions and transcript, lists of segments or null; failed, the code of a
    span that gave neither, or null.
    """
    db.execute("CREATE OR REPLACE TABLE told (asset_id VARCHAR, told VARCHAR)")
    media = f"""SELECT states.*, place FROM states
        JOIN (SELECT asset_id, division, place FROM todo WHERE track = '{SUMMARY}')
        USING (asset_id, division) WHERE track != '{SUMMARY}'"""
    for rows in ledger.bring(db, media):
        db.execute(
            f"""INSERT INTO told SELECT asset_id, to_json({{
                'captions': {ledger.segments_of(f"track = '{FRAMES}'")},
                'transcript': {ledger.segments_of(f"track != '{FRAMES}'")},
                'failed': any_value(error_code)
            }})::VARCHAR FROM {rows} GROUP BY asset_id"""
        )
    db.execute(
        f"""CREATE OR REPLACE TABLE {SUMMARIES} AS
        SELECT asked.* REPLACE (told AS variables)
        FROM (SELECT * FROM todo WHERE track = '{SUMMARY}') AS asked
        LEFT JOIN told USING (asset_id)"""
    )
