"""The tables of a silo's one SQLite file, beside the ledger's (ledger.py) and the audit chain's (wardround/audit.py)."""

SCHEMA = """
-- Facts about this installation: federation, silo, target (host:port), operator_key, audit_key (public, of this silo's chain);
-- paused: why, while IT wants nothing new to begin.
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;

-- The aggregator's audit heads as this silo saw them: whoever cuts that chain is found out here.
CREATE TABLE IF NOT EXISTS heads (
    seq INTEGER PRIMARY KEY CHECK (seq >= 1), hash BLOB NOT NULL, signature BLOB NOT NULL,
    time_ms INTEGER NOT NULL                     -- when this silo saw it, milliseconds since 1970
) STRICT;

-- Signed rosters as received. Which of them count is custody/roster.py's rule; here stands what IT approved by hand.
CREATE TABLE IF NOT EXISTS rosters (
    version INTEGER PRIMARY KEY CHECK (version >= 1),
    data BLOB NOT NULL,                          -- roster.json as signed by the operator
    approved_ms INTEGER                          -- when IT approved it, ms since 1970; NULL: by rule or not at all
) STRICT;

CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY,
    plan BLOB NOT NULL,                          -- canonical JSON; what was judged is what trains
    stance TEXT NOT NULL CHECK (stance IN ('accepted', 'refusing', 'refused', 'joined', 'closed')),
    code TEXT, reason TEXT,                      -- of a refusal: error code and one sentence
    snapshot TEXT,                               -- hex digest; a run trains on one snapshot
    statement BLOB,                              -- the signed Join, exactly as sent
    model_round INTEGER NOT NULL DEFAULT -1,     -- newest global model: -1 none, 0 the initial one
    halt BLOB,                                   -- the signed Halt, exactly as sent: a sum failed the check
    CHECK ((stance IN ('refusing', 'refused')) = (code IS NOT NULL))
) STRICT;

-- Runs that the policy accepted and that wait, or waited, for IT's word (approval: manual). It is given for one run of one plan.
CREATE TABLE IF NOT EXISTS approvals (
    run TEXT PRIMARY KEY REFERENCES runs,
    plan_digest BLOB NOT NULL CHECK (length(plan_digest) = 32),
    approved_ms INTEGER                          -- ms since 1970; NULL: not yet
) STRICT;

-- Key epochs this silo holds or held. Destroyed keys are overwritten (secure_delete): once a newer epoch serves alone, after a
-- failed check, and when the run closes.
CREATE TABLE IF NOT EXISTS epochs (
    run TEXT NOT NULL REFERENCES runs,
    number INTEGER NOT NULL CHECK (number >= 1),
    first_round INTEGER NOT NULL CHECK (first_round >= 1),
    roster_digest BLOB NOT NULL CHECK (length(roster_digest) = 32),
    commitment BLOB NOT NULL CHECK (length(commitment) = 32),
    secrets BLOB,                                -- EpochKeys.secrets; NULL once destroyed
    statement BLOB NOT NULL,                     -- the signed KeyEpoch or EpochAck, exactly as sent
    checkpoint TEXT,                             -- hex digest of the checkpoint this silo made for it; NULL: none
    told INTEGER NOT NULL DEFAULT 0 CHECK (told IN (0, 1)),  -- acknowledged by the aggregator
    PRIMARY KEY (run, number)
) STRICT;

CREATE TABLE IF NOT EXISTS models (
    run TEXT NOT NULL REFERENCES runs,
    round INTEGER NOT NULL CHECK (round >= 0),
    mac BLOB NOT NULL CHECK (length(mac) = 32),
    exponents TEXT NOT NULL,                     -- JSON list: log2 of the next round's bound per array
    state TEXT NOT NULL,                         -- hex digest of the model's file in the spool
    ctx BLOB CHECK (length(ctx) = 32),           -- of the attempt whose sum it came from; NULL for the initial model
    sum_digest BLOB,                             -- of the sum it came from; NULL for the initial model
    means TEXT NOT NULL DEFAULT '{}',            -- JSON: cohort means that came out of the sum (they measure the round before)
    declared TEXT NOT NULL DEFAULT '{}',         -- JSON: silo -> declared patients, of the silos of that sum; empty if restored
    saturated REAL NOT NULL DEFAULT 0,           -- fraction of the cohort's values that saturated, 0..1
    metrics TEXT,                                -- JSON: this silo's validation metrics; NULL until evaluated
    num_validation INTEGER,                      -- patients behind `metrics`
    seconds TEXT NOT NULL DEFAULT '{}',          -- JSON: seconds per phase
    reported INTEGER NOT NULL DEFAULT 0 CHECK (reported IN (0, 1)),  -- acknowledged by the aggregator
    PRIMARY KEY (run, round)
) STRICT;

-- Where the plan's stop rule stands after the newest model (wardround/stop.py), of a run that has one.
CREATE TABLE IF NOT EXISTS progress (
    run TEXT PRIMARY KEY REFERENCES runs,
    measured INTEGER NOT NULL, best REAL NOT NULL, waited INTEGER NOT NULL,
    stopped_after INTEGER NOT NULL CHECK (stopped_after >= 0)  -- the last round that trains; 0: the plan's
) STRICT;

-- The model that trained on this hospital's patients alone, of a plan with local_gain (silo_agent/alone.py).
CREATE TABLE IF NOT EXISTS alone (
    run TEXT PRIMARY KEY REFERENCES runs,
    state TEXT NOT NULL,                         -- hex digest of its file in the spool; the file goes when the run closes
    metrics TEXT                                 -- JSON: of the last one, on this silo's validation patients; NULL until measured
) STRICT;

-- One per round that trains. random_key drives batches, patches and rounding; it is deleted when the run closes.
CREATE TABLE IF NOT EXISTS events (
    run TEXT NOT NULL REFERENCES runs,
    round INTEGER NOT NULL CHECK (round >= 1),
    random_key BLOB CHECK (length(random_key) = 32),
    seeded INTEGER NOT NULL CHECK (seeded IN (0, 1)),  -- 1: reproducible, hence forbidden for release
    opened_ms INTEGER NOT NULL,
    update_digest TEXT,                          -- hex; NULL until the one update of this event is durable
    num_patients INTEGER,
    PRIMARY KEY (run, round)
) STRICT;

-- What stays at home of a run: layers that never leave, and the silo's own control variate (silo_agent/algorithms/at_home.py).
CREATE TABLE IF NOT EXISTS homes (
    run TEXT NOT NULL REFERENCES runs,
    round INTEGER NOT NULL CHECK (round >= 0),   -- whose training left it so; 0: as the initial model has it
    digest TEXT NOT NULL,                        -- hex digest of its file in the spool
    PRIMARY KEY (run, round)
) STRICT;

-- What was made for one attempt of one round: at most one upload and one Seal, ever.
CREATE TABLE IF NOT EXISTS attempts (
    run TEXT NOT NULL REFERENCES runs,
    round INTEGER NOT NULL CHECK (round >= 1),
    attempt INTEGER NOT NULL CHECK (attempt >= 1),
    ctx BLOB NOT NULL CHECK (length(ctx) = 32),
    header BLOB NOT NULL,                        -- the signed UploadHeader, exactly as sent
    uploaded INTEGER NOT NULL DEFAULT 0 CHECK (uploaded IN (0, 1)),
    seal BLOB,                                   -- the signed Seal, exactly as sent
    seal_sent INTEGER NOT NULL DEFAULT 0 CHECK (seal_sent IN (0, 1)),
    PRIMARY KEY (run, round, attempt)
) STRICT;

-- The bundle of a run's final model, if this silo was asked to make it.
CREATE TABLE IF NOT EXISTS bundles (
    run TEXT PRIMARY KEY REFERENCES runs,
    content TEXT NOT NULL,                       -- hex digest of what is uploaded
    statement BLOB NOT NULL,                     -- the signed Bundle, exactly as sent
    sent INTEGER NOT NULL DEFAULT 0 CHECK (sent IN (0, 1))
) STRICT;

-- What the agent is doing, for `silo-agent status`: one row.
CREATE TABLE IF NOT EXISTS activity (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    word TEXT NOT NULL, detail TEXT NOT NULL, since_ms INTEGER NOT NULL
) STRICT;
"""
