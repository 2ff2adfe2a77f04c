"""Words that a fact may be: what a header says is looked up here, and what is not here is not stored.

Each function takes the text, or the list of texts, that a header holds, and gives the word that is stored, or None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def _known(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Body Part Examined: the terms of the standard (PS3.16, Annex L).
_BODY_PARTS = _known(
    """
    ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM BACK BLADDER BRAIN BREAST CALF CAROTID CERVIX CHEST CHESTABDOMEN
    CHESTABDPELVIS CLAVICLE COCCYX COLON CSPINE CTSPINE ELBOW EXTREMITY EYE FEMUR FINGER FOOT GALLBLADDER HAND HEAD
    HEADNECK HEART HIP HUMERUS IAC JAW KIDNEY KNEE LEG LIVER LSPINE LSSPINE LUNG MEDIASTINUM NECK NECKCHEST
    NECKCHESTABDPELV NECKCHESTABDOMEN ORBIT PANCREAS PAROTID PELVIS PITUITARY PROSTATE RECTUM RIB SHOULDER SKULL SPINE
    SPLEEN SSPINE STERNUM TESTIS THIGH THYMUS THYROID TMJ TONGUE TRACHEA TSPINE UTERUS WHOLEBODY WRIST
    """
)
# The first word of Manufacturer → the name that is stored: makers changed their spelling over the years.
_MAKERS = {
    **dict.fromkeys(("SIEMENS", "CPS", "CTI"), "Siemens"),
    **dict.fromkeys(("GE", "GEMS", "GEHC"), "GE"),
    **dict.fromkeys(("PHILIPS", "ADAC", "MARCONI", "PICKER"), "Philips"),
    "TOSHIBA": "Toshiba",
    "CANON": "Canon",
    "UIH": "United Imaging",
    "UNITED": "United Imaging",
    "HITACHI": "Hitachi",
    "FUJIFILM": "Fujifilm",
    "SHIMADZU": "Shimadzu",
    "NEUSOFT": "Neusoft",
    "NEUROLOGICA": "NeuroLogica",
    "SAMSUNG": "Samsung",
    "BRUKER": "Bruker",
    "MEDISO": "Mediso",
    "ESAOTE": "Esaote",
    "HYPERFINE": "Hyperfine",
    "IMRIS": "IMRIS",
    "MINFOUND": "MinFound",
    "ANKE": "Anke",
    "ALLTECH": "Alltech",
    "MITOS": "Mitos",
}
# Words that model names are made of, and the codes between them; a name with any other word is dropped.
_MODEL_FAMILIES = _known(
    """
    ACHIEVA ACTIVION AERA ALEXION ALLEGRA ALPHA ALTEA AMBITION AMIRA AQUILION ARCHITECT ARTIST ASTEION AVANTO BIOGRAPH
    BRILLIANCE BRIGHTSPEED CARTESION CELESTEION CIMA CONFIDENCE CREATOR DEFINITION DISCOVERY DRIVE ECAT ECHELON EDGE
    ELAN ELITION EMOTION ESPREE ESSENZA EVOLUTION EXCITE EXPLORER FLASH FORCE FREE.MAX FREE.STAR GALAN GEMINI GENESIS
    GYROSCAN HARMONY HISPEED HORIZON ICT INCISIVE INGENIA INGENUITY INTERA IQON LIGHTSPEED LIGHTNING LUMINA MAGNETOM
    MCT MMR MOBILITY MX8000 NAEOTOM NEUVIZ OASIS OPTIMA ORIAN ORION PANORAMA PERSPECTIVE PIONEER PRECISION PREMIER PRIME
    PRISMA PRISMA_FIT PROSPEED QUADRA REVOLUTION SCENARIA SCOPE SEMPRA SENSATION SIGNA SKYRA SKYRA_FIT SOLA SOLA_FIT
    SOMATOM SONATA SPECTRA SPECTRAL SPIRIT SUPRIA SWOOP SYMPHONY SYMPHONYTIM TERRA TITAN TRIO TRIOTIM TRITON TRUEPOINT
    UCT UEXPLORER UMI UMR VANTAGE VEREOS VERIO VIDA VIDA_FIT VISION VOYAGER X.CITE
    GO.ALL GO.FIT GO.NOW GO.OPEN GO.SIM GO.TOP GO.UP
    """
)
_MODEL_CODES = re.compile(
    r"""
    \d{1,3} | \d(\.\d)?T | [A-Z]{1,2} | x | AS\+ | PET | PET[/-](CT|MR) | HD | HDxt? | HDe | IDT | VCT | TOF | ONE |
    CXL | GSI | EVO | MIDR | Plus | Pro | Max | Tim | Fit | Pulsar | Nova | Dual | Ultra | nXeed | dStream | BigBore |
    Big | Bore | Open | Flow | (CT|MR)\d{3}[a-z]? | \d{3}[a-z]
    """,
    re.VERBOSE | re.ASCII,
)
_KERNELS = re.compile(
    r"""
    [ABDHIJQSTU][a-z]?\d{2,3}[a-z]? |     # Siemens: B30f, Br40d, I41s, Qr40
    FC\d{2}[A-Z]? |                       # Toshiba, Canon
    [YUESIC]?[A-F] | L |                  # Philips
    STANDARD | STND | SOFT | LUNG | BONE | BONEPLUS | DETAIL | EDGE | CHEST | ULTRA  # GE
    """,
    re.VERBOSE | re.ASCII,
)
_IMAGE_TYPES = _known(
    """
    ORIGINAL DERIVED PRIMARY SECONDARY AXIAL HELIX VOLUME REFORMATTED AVERAGE MPR MIP MINIP CPR RECON RESAMPLED
    PROJECTION FILTERED NORM ND DIS2D DIS3D FM FIL M P R I M_FFE P_FFE R_FFE I_FFE M_SE M_IR M_IP M_OP MAGNITUDE PHASE
    PHASE_MAP REAL IMAGINARY MIXED FFE SE IR IN_PHASE OUT_PHASE WATER FAT IP OP W F DIXON ADC TRACEW FA DIFFUSION
    PERFUSION TOF FLAIR T1 T2 T2_STAR PROTON_DENSITY UNI INV1 INV2 DENOISED MEAN SUB SUBTRACTION WHOLE_BODY STATIC
    DYNAMIC GATED TOMO RECON_TOMO EMISSION TRANSMISSION NONE OTHER CT_SOM5 SPI DECREASED SEQ DUAL_ENERGY
    MONOENERGETIC VMI IODINE OVERVIEW PARALLEL MAP MULTIECHO FIELD_MAP NORMAL SPIN_ECHO GRADIENT_ECHO MFSPLIT
    """
)
_NUCLIDES = _known("F18 C11 N13 O15 GA68 CU64 ZR89 RB82 I124 Y90 Y86 CU62 GA67 TC99M I123 I131 SC44 BR76")
_NUCLIDE_NAMES = {
    "FLUORINE": "F", "CARBON": "C", "NITROGEN": "N", "OXYGEN": "O", "GALLIUM": "GA", "COPPER": "CU",
    "ZIRCONIUM": "ZR", "RUBIDIUM": "RB", "IODINE": "I", "YTTRIUM": "Y", "TECHNETIUM": "TC", "SCANDIUM": "SC",
    "BROMINE": "BR",
}  # fmt: skip
_UNITS = _known("BQML GML CNTS CPS PROPCPS PROPCNTS NONE PCNT CM2ML MLMING 1CM STDDEV")
_UNITS_OF_SIDE_CARS = {"BQ/ML": "BQML", "G/ML": "GML"}
_POSITIONS = _known("HFP HFS HFDR HFDL FFP FFS FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL")
_SEXES = {"M": "M", "F": "F", "O": "O", "MALE": "M", "FEMALE": "F", "OTHER": "O"}
_CORRECTIONS = _known("DECY ATTN SCAT DTIM MOTN PMOT CLN RAN RADL DCAL NORM SENS")
_YES = {"Y": True, "YES": True, "TRUE": True, "N": False, "NO": False, "FALSE": False}
_NO_AGENT = _known("NONE NO N NIL 0 OFF WITHOUT NATIVE NATIV KEIN KEINE KEINS OHNE NEIN SANS NON AUCUN - N/A")


def _words(value: Any) -> list[str]:
    """The texts that a value holds, without blanks around them."""
    several: Iterable[Any] = value if not isinstance(value, str) and isinstance(value, Iterable) else [value]
    return [text for item in several if (text := str(item).strip())]


def _one_of(value: Any, known: frozenset[str]) -> str | None:
    words = [word.upper() for word in _words(value)]
    return words[0] if len(words) == 1 and words[0] in known else None


def body_part(value: Any) -> str | None:
    """A term of the standard."""
    return _one_of(value, _BODY_PARTS)


def manufacturer(value: Any) -> str | None:
    """The maker by the first word of the text, in one spelling."""
    words = re.findall(r"[A-Z]+", " ".join(_words(value)).upper())
    return _MAKERS.get(words[0]) if words else None


def model(value: Any) -> str | None:
    """A model's name that is made of known words and codes alone, at least one of them the name of a family."""
    words = " ".join(_words(value)).split()
    others = [word for word in words if word.upper() not in _MODEL_FAMILIES]
    return " ".join(words) if len(others) < len(words) and all(map(_MODEL_CODES.fullmatch, others)) else None


def kernel(value: Any) -> str | None:
    """A reconstruction kernel spelled as one of the makers spells theirs; Siemens puts a digit behind it."""
    words = _words(value)
    known = len(words) in (1, 2) and _KERNELS.fullmatch(words[0]) and re.fullmatch(r"|\d", "".join(words[1:]), re.ASCII)
    return " ".join(words) if known else None


def image_type(value: Any) -> str | None:
    """The known words of Image Type in their order; the others are left out."""
    words = [word.upper().replace(" ", "_") for word in _words(value)]
    return " ".join(word for word in words if word in _IMAGE_TYPES) or None


def patient_position(value: Any) -> str | None:
    """Such as HFS, head first and supine."""
    return _one_of(value, _POSITIONS)


def contrast(value: Any) -> bool | None:
    """Whether an agent was given: a text that names one says so, one that says none denies it."""
    text = " ".join(_words(value)).upper()
    return None if not text else text not in _NO_AGENT


def mr_acquisition(value: Any) -> str | None:
    """2D or 3D."""
    return _one_of(value, frozenset({"2D", "3D"}))


def scanning_sequence(value: Any) -> str | None:
    """The standard's codes (SE, IR, GR, EP, RM), in their order."""
    words = [word.upper() for text in _words(value) for word in re.split(r"[\\_ ]", text)]
    return " ".join(words) if words and set(words) <= {"SE", "IR", "GR", "EP", "RM"} else None


def pet_units(value: Any) -> str | None:
    """The standard's codes, such as BQML."""
    words = [_UNITS_OF_SIDE_CARS.get(word.upper(), word.upper()) for word in _words(value)]
    return _one_of(words, _UNITS)


def radionuclide(value: Any) -> str | None:
    """Such as F18, from `F18`, `18F`, `^18^Fluorine` or `Fluorine-18`."""
    text = " ".join(_words(value)).upper()
    letters, digits = re.findall(r"[A-Z]+", text), re.findall(r"\d+", text)
    if len(digits) != 1 or not letters or len(letters) > 2:
        return None
    metastable = "M" if letters[-1] == "M" or letters[-1].endswith("CM") else ""
    element = _NUCLIDE_NAMES.get(letters[0], letters[0].removesuffix("M") if metastable else letters[0])
    if len(letters) == 2 and letters[1] != "M":
        return None
    found = element + digits[0] + metastable
    return found if found in _NUCLIDES else None


def decay_correction(value: Any) -> str | None:
    """NONE, START or ADMIN; a side-car's true says no more than that there is one."""
    return _one_of(value, frozenset({"NONE", "START", "ADMIN"}))


def pet_corrections(value: Any) -> str | None:
    """The standard's codes for what an image was corrected for, such as `DECY ATTN SCAT`; others are left out."""
    return " ".join(word for word in map(str.upper, _words(value)) if word in _CORRECTIONS) or None


def yes_or_no(value: Any) -> bool | None:
    """Whether a text says yes or no."""
    words = _words(value)
    return _YES.get(words[0].upper()) if len(words) == 1 else None


def sex(value: Any) -> str | None:
    """M, F or O."""
    words = _words(value)
    return _SEXES.get(words[0].upper()) if len(words) == 1 else None
