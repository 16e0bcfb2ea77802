//! Whether a device is formatted, mounted as it is, or refused.
//!
//! Invariants (a device that was taken for empty by mistake is the classic way to lose replicated data):
//! - A device is formatted only when the *backend* says that no block of the volume holds data, or that a format by
//!   us was begun, never finished, and so never mounted. What a read of the device shows is never enough.
//! - Metadata learns `FORMATTING` before the first byte is written and `FORMATTED` before the first mount.
//! - Whatever does not fit together is refused, loudly, and nothing is written.

use std::path::Path;

use ashlar_proto::rpc::metadata as pb;

use super::{Device, NodeService, Staging};
use crate::errors::{Error, Result};
use crate::metadata::request_id;
use crate::metrics::step;
use crate::mounter::filesystem::{self, Found};
use crate::parameters::FsType;

/// What is to be done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// It has this file system: mount it.
    Mount(FsType),
    /// Make this one; `again`: over the remains of one that was not finished.
    Format {
        /// Which.
        fs: FsType,
        /// Whether remains may be there.
        again: bool,
    },
}

/// What the caller wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// None: whatever is there, else the default.
    pub fs: Option<FsType>,
    /// Whether nothing may be written.
    pub read_only: bool,
}

/// Decides; `why not` is a text for an operator.
pub(super) fn plan(
    found: &Found,
    has_data: Option<bool>,
    format: Option<&pb::VolumeFormat>,
    wanted: Wanted,
) -> std::result::Result<Plan, String> {
    let state = format.map_or(pb::FormatState::Unspecified, pb::VolumeFormat::state);
    let fs_new = wanted.fs.unwrap_or_default();
    // A format that was begun and never finished was never mounted: whatever is there is ours, and worthless.
    if state == pb::FormatState::Formatting {
        return match wanted.read_only {
            false => Ok(Plan::Format {
                fs: fs_new,
                again: true,
            }),
            true => Err("its format was never finished, and it is to be read only".to_owned()),
        };
    }
    match found {
        Found::FileSystem(name) => {
            let Ok(Some(there)) = FsType::parse("file system", name) else {
                return Err(format!(
                    "it holds {name}, which is none of ext4 and xfs; it is left as it is"
                ));
            };
            if wanted.fs.is_some_and(|w| w != there) {
                return Err(format!(
                    "it holds {there}, and {fs_new} is asked for; it is left as it is (ask for {there}, or use another \
                     volume)"
                ));
            }
            Ok(Plan::Mount(there))
        }
        Found::Other(what) => Err(format!(
            "it holds {what}, which is no file system to mount; it is left as it is (use it as a raw block volume)"
        )),
        Found::Nothing if state == pb::FormatState::Formatted => Err(
            "it was formatted, but no file system can be found on it: it was damaged or overwritten; restore it, or \
             repair it by hand"
                .to_owned(),
        ),
        Found::Nothing => match (has_data, wanted.read_only) {
            (Some(false), false) => Ok(Plan::Format {
                fs: fs_new,
                again: false,
            }),
            (Some(false), true) => Err(
                "it is empty, and is to be read only: there is nothing to mount, and it must not be formatted".to_owned(),
            ),
            (Some(true), _) => Err(
                "it holds data without a file system that is known here; it is not formatted (use it as a raw block \
                 volume, or another volume)"
                    .to_owned(),
            ),
            (None, _) => Err("nbd-client does not say whether it holds data; it is not formatted".to_owned()),
        },
    }
}

impl NodeService {
    /// Sees to it that a device has a file system that may be mounted; which.
    pub(super) async fn prepare(
        &self,
        staging: &Staging,
        volume: &pb::Volume,
        device: &Device,
        wanted: Wanted,
    ) -> Result<FsType> {
        let found = step("probe", filesystem::probe(&device.path)).await?;
        let has_data = device.attachment.has_data;
        let plan = plan(&found, has_data, volume.format.as_ref(), wanted).map_err(|why| {
            tracing::error!(volume = %staging.id, name = volume.name, ?found, ?has_data, why, "volume refused");
            Error::Precondition(format!("volume {} ({}): {why}", staging.id, volume.name))
        })?;
        match plan {
            Plan::Mount(fs) => {
                if !wanted.read_only {
                    step("check", filesystem::check(fs, &device.path)).await?;
                }
                Ok(fs)
            }
            Plan::Format { fs, again } => {
                self.format(staging, &device.path, fs, again).await?;
                Ok(fs)
            }
        }
    }

    async fn format(
        &self,
        staging: &Staging,
        device: &Path,
        fs: FsType,
        again: bool,
    ) -> Result<()> {
        tracing::info!(volume = %staging.id, device = %device.display(), %fs, again, "formatting");
        self.set_format(staging, fs, pb::FormatState::Formatting)
            .await?;
        let options = &staging.context.mkfs_options;
        step("format", filesystem::make(fs, device, options, again)).await?;
        self.set_format(staging, fs, pb::FormatState::Formatted)
            .await
    }

    async fn set_format(
        &self,
        staging: &Staging,
        fs: FsType,
        state: pb::FormatState,
    ) -> Result<()> {
        let request = pb::SetVolumeFormatRequest {
            request_id: request_id(),
            volume_id: staging.id.to_vec(),
            format: Some(pb::VolumeFormat {
                state: state.into(),
                fs_type: fs.name().to_owned(),
            }),
        };
        self.metadata
            .ask("record the volume's format", request, async |mut c, q| {
                c.set_volume_format(q).await
            })
            .await?;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn format(state: pb::FormatState) -> pb::VolumeFormat {
        pb::VolumeFormat {
            state: state.into(),
            fs_type: "ext4".into(),
        }
    }

    fn wanted(fs: Option<FsType>) -> Wanted {
        Wanted {
            fs,
            read_only: false,
        }
    }

    const READ_ONLY: Wanted = Wanted {
        fs: None,
        read_only: true,
    };

    fn fs(name: &str) -> Found {
        Found::FileSystem(name.into())
    }

    #[test]
    fn only_a_volume_without_data_is_formatted() {
        let new = |fs| Ok(Plan::Format { fs, again: false });
        let any = wanted(None);
        assert_eq!(
            plan(&Found::Nothing, Some(false), None, any),
            new(FsType::Ext4)
        );
        let xfs = wanted(Some(FsType::Xfs));
        assert_eq!(
            plan(&Found::Nothing, Some(false), None, xfs),
            new(FsType::Xfs)
        );
        for has_data in [Some(true), None] {
            assert!(plan(&Found::Nothing, has_data, None, any).is_err());
        }
        assert!(plan(&Found::Nothing, Some(false), None, READ_ONLY).is_err());
        for found in [Found::Other("gpt".into()), fs("ntfs"), fs("btrfs")] {
            for has_data in [Some(true), Some(false), None] {
                assert!(plan(&found, has_data, None, any).is_err(), "{found:?}");
            }
        }
    }

    #[test]
    fn an_unfinished_format_is_done_again_and_a_finished_one_never() {
        let begun = format(pb::FormatState::Formatting);
        let any = wanted(None);
        for found in [Found::Nothing, fs("ext4"), Found::Other("half".into())] {
            let again = Plan::Format {
                fs: FsType::Ext4,
                again: true,
            };
            assert_eq!(plan(&found, Some(true), Some(&begun), any), Ok(again));
        }
        assert!(plan(&Found::Nothing, Some(true), Some(&begun), READ_ONLY).is_err());
        let done = format(pb::FormatState::Formatted);
        for has_data in [Some(false), Some(true), None] {
            let why = plan(&Found::Nothing, has_data, Some(&done), any).unwrap_err();
            assert!(why.contains("was formatted"), "{why}");
        }
    }

    #[test]
    fn what_is_there_is_mounted_unless_something_else_is_asked_for() {
        let any = wanted(None);
        assert_eq!(
            plan(&fs("xfs"), Some(true), None, any),
            Ok(Plan::Mount(FsType::Xfs))
        );
        assert_eq!(
            plan(&fs("ext4"), None, None, READ_ONLY),
            Ok(Plan::Mount(FsType::Ext4))
        );
        let why = plan(&fs("xfs"), Some(true), None, wanted(Some(FsType::Ext4))).unwrap_err();
        assert!(why.contains("xfs") && why.contains("ext4"), "{why}");
    }
}
