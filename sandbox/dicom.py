"""Writes the DICOM folders of the sandbox's hospitals, once: one MR series and one DICOM SEG per patient.

Same arguments and same code, same bytes: every UID, date and name is drawn from the seed. The folder's name carries a digest of
both, so nothing stale is ever read, and a folder appears only when it is whole.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage, generate_uid

from sandbox.anatomy import GREY, WHITE, draw_patient, load_anatomy
from sandbox.scanner import MAX_STORED, SLICE_SPACING_MM, Hospital, Stack, acquire
from wardround.canonical import canonical_json

NUM_PROCESSES = 2
PATIENTS_A_JOB = 10
STATEMENT = "simulated from one real anatomy (MNI152)"
CODED = {GREY: codes.SCT.GrayMatter, WHITE: codes.SCT.WhiteMatter}
SURNAMES = ("Aalto", "Bauer", "Claes", "Dubois", "Eriksen", "Farkas", "Grey", "Hughes", "Ivanova", "Jacobs", "Kaya", "Lindt")
GIVEN_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya", "Louis")


def write_hospitals(
    root: Path,
    hospitals: Sequence[Hospital],
    num_patients: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Path]:
    """The DICOM folder of each hospital under `root`, by hospital name; written if it is not there yet.

    `num_patients` is per hospital; `progress(done, total)` counts patients over all hospitals that had to be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    folders = {h.name: root / f"{h.name}-{_digest(h, num_patients, seed)}" for h in hospitals}
    missing = [h for h in hospitals if not folders[h.name].exists()]
    if not missing:
        return folders
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        _write_all(partial, missing, num_patients, seed, progress)
        for hospital in missing:
            if not folders[hospital.name].exists():  # a second sandbox may have been quicker; its bytes are the same
                (partial / hospital.name).rename(folders[hospital.name])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folders


def _digest(hospital: Hospital, num_patients: int, seed: int) -> str:
    """16 hex digits over everything the bytes depend on: the arguments and the code that draws and writes."""
    code = [Path(__file__).with_name(name).read_bytes() for name in ("anatomy.py", "scanner.py", "dicom.py")]
    arguments = canonical_json([asdict(hospital), num_patients, seed])
    return hashlib.sha256(b"".join([arguments, *code])).hexdigest()[:16]


def _write_all(
    root: Path, hospitals: Sequence[Hospital], num_patients: int, seed: int, progress: Callable[[int, int], None]
) -> None:
    done, total = 0, num_patients * len(hospitals)
    jobs = [(h, range(i, min(i + PATIENTS_A_JOB, num_patients))) for h in hospitals for i in range(0, num_patients, PATIENTS_A_JOB)]
    with ProcessPoolExecutor(min(NUM_PROCESSES, len(jobs)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(write_patients, root / h.name, h, numbers, seed): len(numbers) for h, numbers in jobs}
        for finished in as_completed(running):
            finished.result()
            done += running[finished]
            progress(done, total)


def write_patients(folder: Path, hospital: Hospital, numbers: Sequence[int], seed: int) -> None:
    """`folder/0000/IM0001.dcm ... SEG.dcm` for each patient number: each drawn from (seed, hospital, number) alone."""
    anatomy = load_anatomy()
    for number in numbers:
        random = np.random.default_rng([seed, number, *hospital.name.encode()])
        stack = acquire(hospital.scanner, anatomy, draw_patient(random), random)
        images = _mr_series(hospital, stack, _Uids(f"wardround/{seed}/{hospital.name}/{number}"), random)
        segmentation = _segmentation(hospital, stack, images, _Uids(f"wardround/{seed}/{hospital.name}/{number}/seg"))
        study = folder / f"{number:04d}"
        study.mkdir(parents=True)
        for image in images:
            if image.file_meta.TransferSyntaxUID != hospital.scanner.transfer_syntax:
                image.compress(hospital.scanner.transfer_syntax, generate_instance_uid=False)
            image.save_as(study / f"IM{image.InstanceNumber:04d}.dcm", enforce_file_format=True)
        segmentation.save_as(study / "SEG.dcm", enforce_file_format=True)


class _Uids:
    """UIDs that follow from a name (PS3.5 B.2: derived from a UUID; here from SHA-512 under pydicom's root)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, part: str) -> UID:
        return generate_uid(entropy_srcs=[self._name, part])


def _mr_series(hospital: Hospital, stack: Stack, uids: _Uids, random: np.random.Generator) -> list[Dataset]:
    """MR Image Storage (PS3.3 A.4), uncompressed; one dataset a slice, with the identifying headers a real one carries."""
    shared = _patient_and_study(hospital, uids, random)
    _series_and_equipment(shared, hospital, uids)
    native = hospital.scanner.transfer_syntax
    images = []
    for index, pixels in enumerate(stack.pixels):
        image = Dataset()
        image.update(shared)
        image.file_meta = FileMetaDataset()
        image.file_meta.MediaStorageSOPClassUID = MRImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = uids(f"image {index}")
        image.file_meta.TransferSyntaxUID = native if native == ImplicitVRLittleEndian else ExplicitVRLittleEndian
        image.SOPClassUID = MRImageStorage
        image.SOPInstanceUID = uids(f"image {index}")
        image.InstanceNumber = index + 1
        image.ImagePositionPatient = [f"{v:.4f}" for v in stack.positions_mm[index]]
        image.ImageOrientationPatient = [f"{v:.8f}" for v in (*stack.row_cosines, *stack.column_cosines)]
        image.SmallestImagePixelValue, image.LargestImagePixelValue = int(pixels.min()), int(pixels.max())
        image.Rows, image.Columns = pixels.shape
        image.PixelData = pixels.astype("<u2").tobytes()
        image["PixelData"].VR = "OW"
        images.append(image)
    return images


def _patient_and_study(hospital: Hospital, uids: _Uids, random: np.random.Generator) -> Dataset:
    """An invented person and visit: what de-identification has to leave behind."""
    shared = Dataset()
    shared.SpecificCharacterSet = "ISO_IR 192"
    digits = "".join(str(d) for d in random.integers(0, 10, 8))
    shared.PatientName = f"{random.choice(SURNAMES)}^{random.choice(GIVEN_NAMES)}"
    shared.PatientID = f"{hospital.name.upper()}-{digits}-{uids('patient')[-4:]}"
    shared.PatientBirthDate = f"{random.integers(1935, 2004)}{random.integers(1, 13):02d}{random.integers(1, 29):02d}"
    shared.PatientSex = str(random.choice(["F", "M"]))
    shared.PatientAge = f"0{random.integers(20, 89)}Y"
    shared.PatientWeight = f"{random.uniform(50, 110):.1f}"
    shared.PatientAddress = f"{random.integers(1, 300)} Simulation Street"
    shared.StudyDate = f"{random.integers(2019, 2026)}{random.integers(1, 13):02d}{random.integers(1, 29):02d}"
    shared.StudyTime = f"{random.integers(8, 18):02d}{random.integers(0, 60):02d}{random.integers(0, 60):02d}"
    shared.AccessionNumber = f"A{random.integers(10**7, 10**8)}"
    shared.StudyID = digits[:6]
    shared.ReferringPhysicianName = f"{random.choice(SURNAMES)}^{random.choice(GIVEN_NAMES)}^^Dr"
    shared.StudyDescription = "MR brain"
    shared.StudyInstanceUID = uids("study")
    return shared


def _series_and_equipment(shared: Dataset, hospital: Hospital, uids: _Uids) -> None:
    scanner = hospital.scanner
    shared.SeriesInstanceUID = uids("series")
    shared.FrameOfReferenceUID = uids("frame of reference")
    shared.PositionReferenceIndicator = ""
    shared.Modality = "MR"
    shared.SeriesNumber = 3
    shared.SeriesDate, shared.SeriesTime = shared.StudyDate, shared.StudyTime
    shared.ContentDate, shared.ContentTime = shared.StudyDate, shared.StudyTime
    shared.SeriesDescription = f"T1 ax, {STATEMENT}"
    shared.ImageComments = f"{STATEMENT}, brain only"
    shared.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    shared.BodyPartExamined = "BRAIN"
    shared.PatientPosition = "HFS"
    shared.Manufacturer, shared.ManufacturerModelName = scanner.manufacturer, scanner.model
    shared.InstitutionName = hospital.institution
    shared.StationName, shared.DeviceSerialNumber = f"MR-{hospital.name.upper()}"[:16], uids("device")[-6:]
    shared.SoftwareVersions = "wardround sandbox"
    shared.MagneticFieldStrength = str(scanner.field_strength_t)
    shared.ScanningSequence, shared.SequenceVariant, shared.ScanOptions = "GR", "MP", ""
    shared.MRAcquisitionType, shared.EchoTrainLength = "2D", "1"
    shared.RepetitionTime, shared.EchoTime = "500", "10"
    shared.SliceThickness, shared.SpacingBetweenSlices = f"{scanner.slice_thickness_mm:g}", f"{SLICE_SPACING_MM:g}"
    shared.PixelSpacing = [f"{scanner.pixel_mm:.6f}"] * 2
    shared.SamplesPerPixel, shared.PhotometricInterpretation = 1, "MONOCHROME2"
    shared.BitsAllocated, shared.BitsStored, shared.HighBit, shared.PixelRepresentation = 16, 12, 11, 0
    shared.RescaleSlope, shared.RescaleIntercept = (f"{v:g}" for v in scanner.rescale)
    shared.RescaleType = "US"
    shared.WindowCenter, shared.WindowWidth = str((MAX_STORED + 1) // 2), str(MAX_STORED)
    private = shared.private_block(0x0019, "WARDROUND SANDBOX", create=True)
    private.add_new(0x10, "LO", f"operator of {shared.PatientName}")


def _segmentation(hospital: Hospital, stack: Stack, images: list[Dataset], uids: _Uids) -> Dataset:
    """DICOM SEG (PS3.3 A.51), BINARY, one frame per slice and segment that is not empty."""
    scanner = hospital.scanner
    algorithm = AlgorithmIdentificationSequence(name="MNI152 tissue maps", family=codes.DCM.ArtificialIntelligence, version="2009a")
    descriptions = [
        SegmentDescription(
            segment_number=number,
            segment_label=segment.label,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=CODED[segment.tissue],
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, segment in enumerate(hospital.segments, start=1)
    ]
    numbers = np.zeros_like(stack.tissues)
    for number, segment in enumerate(hospital.segments, start=1):
        numbers[stack.tissues == segment.tissue] = number
    native = scanner.transfer_syntax
    seg = Segmentation(
        source_images=images,
        pixel_array=numbers,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=uids("series"),
        series_number=300,
        sop_instance_uid=uids("segmentation"),
        instance_number=1,
        manufacturer="Wardround",
        manufacturer_model_name="sandbox",
        software_versions="1",
        device_serial_number="1",
        content_label="TISSUES",
        content_description=STATEMENT,
        transfer_syntax_uid=native if native == ImplicitVRLittleEndian else ExplicitVRLittleEndian,
        series_description=f"Tissues, {STATEMENT}",
    )
    # highdicom stamps the clock and draws UIDs; here every byte follows from the seed.
    seg.SpecificCharacterSet = "ISO_IR 192"
    seg.SeriesDate = seg.ContentDate = seg.InstanceCreationDate = images[0].StudyDate
    seg.SeriesTime = seg.ContentTime = seg.InstanceCreationTime = images[0].StudyTime
    for equipment in seg.ContributingEquipmentSequence:
        equipment.ContributionDateTime = images[0].StudyDate + images[0].StudyTime
    organization = uids("dimension organization")
    seg.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization
    for index in seg.DimensionIndexSequence:
        index.DimensionOrganizationUID = organization
    return seg
