//! `--device` and `--threads`.

use anyhow::Result;
use tch::Device;

use crate::failure::usage;

/// The device that a name means; `auto` (and nothing) is the first GPU if there is one.
///
/// # Errors
/// A name that is none, or a GPU that is not there (exit code 2).
pub fn device(name: Option<&str>) -> Result<Device> {
    if name == Some("cpu") {
        return Ok(Device::Cpu);
    }
    let gpus = trainer::device::gpus();
    let gpu = |index: usize, name: &str| {
        if index < gpus {
            return Ok(Device::Cuda(index));
        }
        let why = if gpus == 0 {
            format!(": {}", trainer::device::why_no_gpu())
        } else {
            String::new()
        };
        Err(usage(format!(
            "--device {name}: there are {gpus} usable GPUs here{why}; use --device cpu or auto"
        )))
    };
    match name.unwrap_or("auto") {
        "auto" => Ok(if gpus > 0 { Device::Cuda(0) } else { Device::Cpu }),
        "cuda" => gpu(0, "cuda"),
        other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => gpu(index, other),
            None => Err(usage(format!(
                "--device {other}: not a device; use cpu, cuda, cuda:N or auto"
            ))),
        },
    }
}

/// The number of threads: as given, else all cores.
///
/// # Errors
/// None, or absurdly many (exit code 2).
pub fn threads(given: Option<usize>) -> Result<usize> {
    match given {
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        Some(n @ 1..=1024) => Ok(n),
        Some(n) => Err(usage(format!("--threads {n}: 1 to 1024; leave it out for all cores"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_go_by_their_usual_names() {
        assert_eq!(device(Some("cpu")).unwrap(), Device::Cpu);
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:9999"] {
            assert!(device(Some(wrong)).is_err(), "{wrong}");
        }
        assert!(threads(Some(0)).is_err());
        assert_eq!(threads(Some(3)).unwrap(), 3);
    }
}
