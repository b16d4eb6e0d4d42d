"""What every DICOM object of the sandbox has in its header, whatever took the image: an invented person, a visit, a device.

Every UID, date and name is drawn from the seed. It is what de-identification has to leave behind.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

SURNAMES = ("Aalto", "Bauer", "Claes", "Dubois", "Eriksen", "Farkas", "Grey", "Hughes", "Ivanova", "Jacobs", "Kaya", "Lindt")
GIVEN_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya", "Louis")


class Uids:
    """UIDs that follow from a name (PS3.5 B.2: derived from a UUID; here from SHA-512 under pydicom's root)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, part: str) -> UID:
        return generate_uid(entropy_srcs=[self._name, part])


def invent_person(hospital: str, uids: Uids, random: np.random.Generator) -> Dataset:
    """The patient module (PS3.3 C.7.1.1), and what reception noted."""
    person = Dataset()
    person.SpecificCharacterSet = "ISO_IR 192"
    digits = "".join(str(d) for d in random.integers(0, 10, 8))
    person.PatientName = f"{random.choice(SURNAMES)}^{random.choice(GIVEN_NAMES)}"
    person.PatientID = f"{hospital.upper()}-{digits}-{uids('patient')[-4:]}"
    person.PatientBirthDate = f"{random.integers(1935, 2004)}{random.integers(1, 13):02d}{random.integers(1, 29):02d}"
    person.PatientSex = str(random.choice(["F", "M"]))
    person.PatientAge = f"0{random.integers(20, 89)}Y"
    person.PatientWeight = f"{random.uniform(50, 110):.1f}"
    person.PatientAddress = f"{random.integers(1, 300)} Simulation Street"
    return person


def invent_visit(person: Dataset, description: str, uids: Uids, random: np.random.Generator) -> Dataset:
    """The person with one study (PS3.3 C.7.2.1)."""
    visit = Dataset()
    visit.update(person)
    visit.StudyDate = f"{random.integers(2019, 2026)}{random.integers(1, 13):02d}{random.integers(1, 29):02d}"
    visit.StudyTime = f"{random.integers(8, 18):02d}{random.integers(0, 60):02d}{random.integers(0, 60):02d}"
    visit.AccessionNumber = f"A{random.integers(10**7, 10**8)}"
    visit.StudyID = visit.AccessionNumber[1:7]
    visit.ReferringPhysicianName = f"{random.choice(SURNAMES)}^{random.choice(GIVEN_NAMES)}^^Dr"
    visit.StudyDescription = description
    visit.StudyInstanceUID = uids("study")
    return visit


@dataclass(frozen=True)
class Equipment:
    """Whose device took a series (PS3.3 C.7.5.1)."""

    hospital: str
    institution: str
    manufacturer: str
    model: str


def add_series(visit: Dataset, modality: str, equipment: Equipment, description: str, uids: Uids) -> None:
    """The visit's one series, with a private element that repeats whom it shows."""
    visit.SeriesInstanceUID = uids("series")
    visit.Modality = modality
    visit.SeriesNumber = 3
    visit.SeriesDate, visit.SeriesTime = visit.StudyDate, visit.StudyTime
    visit.ContentDate, visit.ContentTime = visit.StudyDate, visit.StudyTime
    visit.SeriesDescription = description
    visit.Manufacturer, visit.ManufacturerModelName = equipment.manufacturer, equipment.model
    visit.InstitutionName = equipment.institution
    visit.StationName, visit.DeviceSerialNumber = f"{modality}-{equipment.hospital.upper()}"[:16], uids("device")[-6:]
    visit.SoftwareVersions = "wardround sandbox"
    private = visit.private_block(0x0019, "WARDROUND SANDBOX", create=True)
    private.add_new(0x10, "LO", f"operator of {visit.PatientName}")


def new_image(series: Dataset, sop_class: UID, number: int, uids: Uids, syntax: UID) -> Dataset:
    """The image of InstanceNumber `number`, without pixels yet. `syntax` is what `save_image` will give it."""
    image = Dataset()
    image.update(series)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uncompressed(syntax)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = sop_class
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = uids(f"image {number}")
    image.InstanceNumber = number
    return image


def uncompressed(syntax: UID) -> UID:
    """What pixels are first written in."""
    return syntax if syntax == ImplicitVRLittleEndian else ExplicitVRLittleEndian


def save_image(image: Dataset, syntax: UID, folder: Path) -> None:
    if image.file_meta.TransferSyntaxUID != syntax:
        image.compress(syntax, generate_instance_uid=False)
    image.save_as(folder / f"IM{image.InstanceNumber:04d}.dcm", enforce_file_format=True)
