//! Bytes on a disk (layout and reasons: docs/formats.md, "Disk format").
