"""Writes the DICOM folders of the sandbox's hospitals, once: one MR series and one DICOM SEG per patient.

Same arguments and same code, same bytes: every UID, date and name is drawn from the seed.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import MRImageStorage

from sandbox.anatomy import GREY, WHITE, draw_patient, load_anatomy
from sandbox.cache import Progress, digest_of, in_processes, silent, write_once
from sandbox.headers import Equipment, Uids, add_series, invent_person, invent_visit, new_image, save_image, uncompressed
from sandbox.scanner import MAX_STORED, SLICE_SPACING_MM, Hospital, Stack, acquire

PATIENTS_A_JOB = 10
STATEMENT = "simulated from one real anatomy (MNI152)"
CODED = {GREY: codes.SCT.GrayMatter, WHITE: codes.SCT.WhiteMatter}
MODULES = ("anatomy.py", "scanner.py", "dicom.py", "headers.py")


def write_hospitals(
    root: Path, hospitals: Sequence[Hospital], num_patients: int, seed: int, progress: Progress = silent
) -> dict[str, Path]:
    """The DICOM folder of each hospital under `root`, by hospital name; written if it is not there yet.

    `num_patients` is per hospital; `progress(done, total)` counts patients over all hospitals that had to be written.
    """
    digests = {h.name: digest_of([asdict(h), num_patients, seed], *MODULES) for h in hospitals}

    def write(folder: Path, missing: Sequence[str]) -> None:
        _write_all(folder, [h for h in hospitals if h.name in missing], num_patients, seed, progress)

    return write_once(root, digests, write)


def _write_all(root: Path, hospitals: Sequence[Hospital], num_patients: int, seed: int, progress: Progress) -> None:
    parts = [range(i, min(i + PATIENTS_A_JOB, num_patients)) for i in range(0, num_patients, PATIENTS_A_JOB)]
    jobs = [(partial(write_patients, root / h.name, h, part, seed), len(part)) for h in hospitals for part in parts]
    in_processes(jobs, progress)


def write_patients(folder: Path, hospital: Hospital, numbers: Sequence[int], seed: int) -> None:
    """`folder/0000/IM0001.dcm ... SEG.dcm` for each patient number: each drawn from (seed, hospital, number) alone."""
    anatomy = load_anatomy()
    for number in numbers:
        random = np.random.default_rng([seed, number, *hospital.name.encode()])
        stack = acquire(hospital.scanner, anatomy, draw_patient(random), random)
        images = _mr_series(hospital, stack, Uids(f"wardround/{seed}/{hospital.name}/{number}"), random)
        segmentation = _segmentation(hospital, stack, images, Uids(f"wardround/{seed}/{hospital.name}/{number}/seg"))
        study = folder / f"{number:04d}"
        study.mkdir(parents=True)
        for image in images:
            save_image(image, hospital.scanner.transfer_syntax, study)
        segmentation.save_as(study / "SEG.dcm", enforce_file_format=True)


def _mr_series(hospital: Hospital, stack: Stack, uids: Uids, random: np.random.Generator) -> list[Dataset]:
    """MR Image Storage (PS3.3 A.4), uncompressed; one dataset a slice, with the identifying headers a real one carries."""
    series = invent_visit(invent_person(hospital.name, uids, random), "MR brain", uids, random)
    equipment = Equipment(hospital.name, hospital.institution, hospital.scanner.manufacturer, hospital.scanner.model)
    add_series(series, "MR", equipment, f"T1 ax, {STATEMENT}", uids)
    _acquisition(series, hospital, uids)
    images = []
    for index, pixels in enumerate(stack.pixels):
        image = new_image(series, MRImageStorage, index + 1, uids, hospital.scanner.transfer_syntax)
        image.ImagePositionPatient = [f"{v:.4f}" for v in stack.positions_mm[index]]
        image.ImageOrientationPatient = [f"{v:.8f}" for v in (*stack.row_cosines, *stack.column_cosines)]
        image.SmallestImagePixelValue, image.LargestImagePixelValue = int(pixels.min()), int(pixels.max())
        image.Rows, image.Columns = pixels.shape
        image.PixelData = pixels.astype("<u2").tobytes()
        image["PixelData"].VR = "OW"
        images.append(image)
    return images


def _acquisition(series: Dataset, hospital: Hospital, uids: Uids) -> None:
    scanner = hospital.scanner
    series.FrameOfReferenceUID = uids("frame of reference")
    series.PositionReferenceIndicator = ""
    series.ImageComments = f"{STATEMENT}, brain only"
    series.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    series.BodyPartExamined = "BRAIN"
    series.PatientPosition = "HFS"
    series.MagneticFieldStrength = str(scanner.field_strength_t)
    series.ScanningSequence, series.SequenceVariant, series.ScanOptions = "GR", "MP", ""
    series.MRAcquisitionType, series.EchoTrainLength = "2D", "1"
    series.RepetitionTime, series.EchoTime = "500", "10"
    series.SliceThickness, series.SpacingBetweenSlices = f"{scanner.slice_thickness_mm:g}", f"{SLICE_SPACING_MM:g}"
    series.PixelSpacing = [f"{scanner.pixel_mm:.6f}"] * 2
    series.SamplesPerPixel, series.PhotometricInterpretation = 1, "MONOCHROME2"
    series.BitsAllocated, series.BitsStored, series.HighBit, series.PixelRepresentation = 16, 12, 11, 0
    series.RescaleSlope, series.RescaleIntercept = (f"{v:g}" for v in scanner.rescale)
    series.RescaleType = "US"
    series.WindowCenter, series.WindowWidth = str((MAX_STORED + 1) // 2), str(MAX_STORED)


def _segmentation(hospital: Hospital, stack: Stack, images: list[Dataset], uids: Uids) -> Dataset:
    """DICOM SEG (PS3.3 A.51), BINARY, one frame per slice and segment that is not empty."""
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
        transfer_syntax_uid=uncompressed(hospital.scanner.transfer_syntax),
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
