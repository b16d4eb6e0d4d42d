"""Who is in a split, whatever the task."""

from silo_agent.snapshot import Record, Snapshot

Patients = dict[str, list[Record]]


def patients_of(snapshot: Snapshot, split: str) -> Patients:
    """Pseudonym -> studies of the patients in `split`, in the order of pseudonym and key, whatever order the snapshot has."""
    patients: Patients = {}
    for record in sorted(snapshot.records, key=lambda r: (r.patient, r.key)):
        if record.split == split:
            patients.setdefault(record.patient, []).append(record)
    return patients
