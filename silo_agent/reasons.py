"""Why ingest left something out: one stable code each, what it means, and what to do. Nothing here names a file or a person.

Counts under these codes are all that leaves ingest about a file that could not be used. `(file)` codes count files,
row-without-study rows, the others series. Pure Python: the agent's command line explains them without pydicom.
"""

from enum import Enum

from wardround.errors import DataError


class Reason(Enum):
    """Value: the code in results and logs; `meaning` and `next_step`: one sentence each."""

    # (file) what the index finds
    NOT_DICOM = (
        "not-dicom",
        "A file is not DICOM (PS3.10 section 7.1).",
        "Move it out of the dataset's folder.",
    )
    UNREADABLE = (
        "unreadable",
        "A file could not be read or parsed to its end.",
        "Check its permissions, then export it again.",
    )
    EMPTY = (
        "empty",
        "A DICOM file holds no data set: it was cut off or damaged.",
        "Export it again.",
    )
    MISSING_UID = (
        "missing-uid",
        "SOPInstanceUID, StudyInstanceUID or SeriesInstanceUID is missing or no UID (PS3.5 section 9.1).",
        "Export it again from the archive.",
    )
    MISSING_PATIENT = (
        "missing-patient",
        "PatientID is missing, so its split cannot be drawn.",
        "Give each person one PatientID.",
    )
    NO_PIXEL_DATA = (
        "no-pixel-data",
        "An object has no image: a report, a directory, or a file cut off before it.",
        "Export it again if it should be an image.",
    )
    DUPLICATE = (
        "duplicate",
        "A file repeats an instance that was indexed already.",
        "Nothing, if copies are expected.",
    )
    # a series as a whole
    CONFLICTING = (
        "conflicting-instances",
        "Two different files claim the same SOPInstanceUID.",
        "Keep the true one.",
    )
    MIXED_IDENTITY = (
        "mixed-identity",
        "The files of one series, or a label and its series, name different patients or studies.",
        "Correct the export: a UID was used twice.",
    )
    NO_LABEL = (
        "series-without-label",
        "No DICOM SEG refers to this series.",
        "Nothing, or add its segmentation.",
    )
    LABEL_WITHOUT_SERIES = (
        "label-without-series",
        "A DICOM SEG refers to a series that is not here.",
        "Add the series.",
    )
    SEVERAL_LABELS = (
        "several-labels",
        "More than one DICOM SEG refers to this series.",
        "Keep the one to learn from.",
    )
    MODALITY = (
        "modality",
        "A labelled series has another Modality than the plan asks for.",
        "Bind another dataset, or change the plan.",
    )
    # its pixels
    TRUNCATED = (
        "truncated",
        "Pixel data end early, or have another length than Rows, Columns and BitsAllocated say (PS3.5 section 8.1.1).",
        "Export the series again.",
    )
    UNDECODABLE = (
        "undecodable",
        "No decoder could decode the pixel data.",
        "Export the series in another transfer syntax.",
    )
    UNSUPPORTED = (
        "unsupported-image",
        "An image is in colour, multi-frame, or has a look-up table.",
        "Export single-frame grey images.",
    )
    BURNED_IN = (
        "burned-in-text",
        "BurnedInAnnotation says that identifying text is in the pixels.",
        "Use the original images.",
    )
    PIXEL_RANGE = (
        "pixel-range",
        "Stored values lie outside BitsStored or LargestImagePixelValue: pixels are damaged.",
        "Export the series again.",
    )
    RESCALE = (
        "rescale",
        "RescaleSlope or RescaleIntercept is missing for CT, zero, absurd or not a number.",
        "Export the series again.",
    )
    CHANGED = (
        "changed",
        "A file changed while ingest was reading.",
        "Ingest again when the export is finished.",
    )
    # photographs
    UNSUPPORTED_PHOTOGRAPH = (
        "unsupported-photograph",
        "An image of a series of photographs is grey, multi-frame, or not of 8 bits in RGB or YBR_FULL.",
        "Export the series as single-frame colour images.",
    )
    IMAGE_COUNT = (
        "image-count",
        "A series has more or fewer photographs than the plan's data.images.",
        "Export the whole series, or change the plan.",
    )
    IMAGE_ORDER = (
        "image-order",
        "InstanceNumber is missing or the same in two photographs of a series: their order is not known.",
        "Number them.",
    )
    SEVERAL_SERIES = (
        "several-series",
        "A study has several series of photographs, and a row of the CSV names a study.",
        "Keep the one to learn from.",
    )
    # its geometry
    GEOMETRY = (
        "geometry",
        "ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing or impossible (PS3.3 C.7.6.2).",
        "Export the original series.",
    )
    MIXED_GEOMETRY = (
        "mixed-geometry",
        "Slices of one series differ in orientation, size, PixelSpacing or FrameOfReferenceUID.",
        "Split it into one series per stack.",
    )
    SINGLE_SLICE = (
        "single-slice",
        "A series has one slice, and SliceThickness is no spacing.",
        "Use a series with two or more slices.",
    )
    DUPLICATE_POSITION = (
        "duplicate-position",
        "Two slices lie at the same ImagePositionPatient.",
        "Split it by phase or echo.",
    )
    UNEVEN_SPACING = (
        "uneven-spacing",
        "Slices are not evenly spaced along one line: one is missing, or the gantry was tilted.",
        "Add the missing slices, or resample.",
    )
    # its label
    LABEL_UNSUPPORTED = (
        "label-unsupported",
        "A DICOM SEG is not of SegmentationType BINARY.",
        "Export it as binary segments.",
    )
    SEGMENT_MISSING = (
        "segment-missing",
        "A DICOM SEG lacks a segment that a class of the plan is bound to.",
        "Correct the dataset's `segments` in the settings, or the SEG.",
    )
    SEGMENTS_OVERLAP = (
        "segments-overlap",
        "A voxel is claimed by segments of two classes.",
        "Correct the segmentation.",
    )
    LABEL_GEOMETRY = (
        "label-geometry",
        "A DICOM SEG does not lie on its series' grid or in its frame of reference.",
        "Export it on the grid of the series.",
    )
    SERIES_INCOMPLETE = (
        "series-incomplete",
        "A DICOM SEG refers to images of its series that are not here.",
        "Export the series again.",
    )
    # its row in a CSV of labels
    ROW_WITHOUT_STUDY = (
        "row-without-study",
        "A row of the CSV names a StudyInstanceUID that no series here has.",
        "Add the study, or correct the row.",
    )
    STUDY_WITHOUT_ROW = (
        "study-without-row",
        "No row of the CSV names this series' StudyInstanceUID.",
        "Nothing, or add its row.",
    )
    ROWS_DISAGREE = (
        "rows-disagree",
        "Rows of the CSV give one study different words.",
        "Keep the true one.",
    )
    UNKNOWN_WORD = (
        "unknown-word",
        "The CSV's word for a study is bound to no class of the plan.",
        "Correct the dataset's `values` in the settings, or the row.",
    )
    NOT_FINITE = (
        "not-finite",
        "The plan's transforms made values that are not finite.",
        "Change data.transforms in the plan.",
    )

    def __init__(self, code: str, meaning: str, next_step: str) -> None:
        self.code = code
        self.meaning = meaning
        self.next_step = next_step


class Quarantined(DataError):
    """One file or series is left out, and why. Ingest counts it and goes on."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"{reason.meaning} {reason.next_step}")
        self.reason = reason
