"""The program `trainer`: networks, FedProx, evaluation. It has the GPU and the snapshot; no keys, no DICOM, no way out."""

from silo_agent.monai_alone import import_monai

import_monai()
