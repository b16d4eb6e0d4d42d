"""One federation on one machine: writes the hospitals' DICOM, starts the real programs, prints the table."""
