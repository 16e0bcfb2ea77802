//! What the node remembers of its attachments: a file per volume in the state directory, so that the next
//! process finds its devices again.
//!
//! Invariants:
//! - A file is replaced whole (written beside it, made durable, renamed) and carries a checksum; one that
//!   does not match is set aside and never believed.
//! - The record is there before the kernel knows the device, and goes after the kernel has let it go.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ashlar_proto::ids::{ClientId, VolumeId};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
const SUFFIX: &str = "json";

/// How a volume became a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Kernel NBD.
    Nbd,
    /// nbdfuse and a loop device.
    Loop,
}

/// An attachment. Fields are only added.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    #[serde(with = "text")]
    pub volume_id: VolumeId,
    /// Its name.
    pub volume: String,
    /// The kind of device.
    pub kind: Kind,
    /// Run of the kernel that has the device.
    pub boot_id: String,
    /// X of /dev/nbdX or /dev/loopX; absent until the kernel has told it.
    pub index: Option<u32>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Logical block size.
    pub block_size: u32,
    /// NBD connections.
    pub connections: u32,
    /// When it was attached.
    pub attached_unix_ms: u64,
    /// Another client took the volume over: it is not to be opened again for this device.
    pub fenced: Option<String>,
    /// The epoch in which the last process closed the volume to hand it over. Worth something only while
    /// metadata names no later one.
    #[serde(default)]
    pub closed_epoch: Option<u64>,
}

impl Record {
    /// What the kernel is told, and asked for, as the device's backend.
    pub fn backend(&self) -> String {
        self.volume_id.to_string()
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    record: Record,
}

mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The records of a state directory.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Opens (and makes) the directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("attachments");
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(format!("{volume}.{SUFFIX}"))
    }

    /// Makes a record durable, in place of the volume's former one.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        let path = self.path(record.volume_id);
        write_durably(&path, &encode(record)?)
    }

    /// Removes a volume's record, if there is one.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn remove(&self, volume: VolumeId) -> io::Result<()> {
        match fs::remove_file(self.path(volume)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::File::open(&self.dir)?.sync_all(),
        }
    }

    /// All records that can be believed. Others are set aside, under a name that is not looked at again.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn load(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != SUFFIX) {
                continue;
            }
            match decode(&fs::read(&path)?) {
                Ok(record) if path == self.path(record.volume_id) => records.push(record),
                outcome => {
                    let why = outcome.err().unwrap_or_else(|| "its name is wrong".into());
                    let aside = path.with_extension("unreadable");
                    tracing::error!(
                        path = %path.display(), why,
                        "a record of an attachment is unreadable and was set aside; if its device is still there, detach it by \
                         hand (nbd-client -d)"
                    );
                    fs::rename(&path, aside)?;
                }
            }
        }
        records.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(records)
    }
}

/// One line of JSON, and a line with its CRC-32C.
fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&File {
        version: VERSION,
        record: record.clone(),
    })?;
    let sum = crc32c::crc32c(&bytes);
    writeln!(bytes, "\n{sum:08x}")?;
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Record, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let (body, sum) = text
        .strip_suffix('\n')
        .and_then(|t| t.rsplit_once('\n'))
        .ok_or("it is cut short")?;
    let sum = u32::from_str_radix(sum, 16).map_err(|e| e.to_string())?;
    if crc32c::crc32c(body.as_bytes()) != sum {
        return Err("its checksum does not match".into());
    }
    let file: File = serde_json::from_str(body).map_err(|e| e.to_string())?;
    if file.version != VERSION {
        return Err(format!("its version {} is unknown", file.version));
    }
    Ok(file.record)
}

/// Replaces a file by one that is durable.
fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// The client id of a state directory, made at the first call. Metadata lets the same client open again
/// what it holds.
///
/// # Errors
/// If it cannot be read or made.
pub fn client_id(state_dir: &Path) -> io::Result<ClientId> {
    let path = state_dir.join("client-id");
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|e| {
            let text = format!("{}: {e}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = ClientId::generate();
            write_durably(&path, format!("{id}\n").as_bytes())?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn record(name: &str) -> Record {
        Record {
            volume_id: VolumeId::generate(),
            volume: name.to_owned(),
            kind: Kind::Nbd,
            boot_id: "b".into(),
            index: Some(3),
            read_only: false,
            block_size: 512,
            connections: 2,
            attached_unix_ms: 1,
            fenced: None,
            closed_epoch: None,
        }
    }

    #[test]
    fn the_bytes_of_a_record() {
        let mut r = record("data");
        r.volume_id = "0197f4a0-0000-7000-8000-000000000001".parse().unwrap();
        let expected = concat!(
            r#"{"version":1,"record":{"volume_id":"0197f4a0-0000-7000-8000-000000000001","volume":"data","kind":"nbd","#,
            r#""boot_id":"b","index":3,"read_only":false,"block_size":512,"connections":2,"attached_unix_ms":1,"fenced":null,"closed_epoch":null}}"#,
        );
        let bytes = String::from_utf8(encode(&r).unwrap()).unwrap();
        let sum = crc32c::crc32c(expected.as_bytes());
        assert_eq!(bytes, format!("{expected}\n{sum:08x}\n"));
        assert_eq!(decode(bytes.as_bytes()).unwrap(), r);
    }

    #[test]
    fn records_are_found_again_and_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let (mut a, b) = (record("a"), record("b"));
        records.save(&b).unwrap();
        records.save(&a).unwrap();
        a.index = Some(9);
        records.save(&a).unwrap();
        assert_eq!(records.load().unwrap(), [a.clone(), b.clone()]);
        records.remove(a.volume_id).unwrap();
        records.remove(a.volume_id).unwrap();
        assert_eq!(Records::open(dir.path()).unwrap().load().unwrap(), [b]);
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let (good, bad) = (record("good"), record("bad"));
        records.save(&good).unwrap();
        let path = records.path(bad.volume_id);
        let whole = encode(&bad).unwrap();
        for at in [0, 20, whole.len() / 2, whole.len() - 3] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(
                records.load().unwrap(),
                std::slice::from_ref(&good),
                "byte {at}"
            );
            assert!(!path.exists());
        }
        for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(
                records.load().unwrap(),
                std::slice::from_ref(&good),
                "cut at {cut}"
            );
        }
        // A whole record under another volume's name is not believed either.
        fs::write(records.path(VolumeId::generate()), &whole).unwrap();
        assert_eq!(records.load().unwrap(), [good]);
    }

    #[test]
    fn the_client_id_stays() {
        let dir = tempfile::tempdir().unwrap();
        let id = client_id(dir.path()).unwrap();
        assert_eq!(client_id(dir.path()).unwrap(), id);
        fs::write(dir.path().join("client-id"), "nonsense").unwrap();
        assert!(client_id(dir.path()).is_err());
    }
}
