/* The packed file format for C11. Generated from bnnfree/format/schema.py: python tools/gen_format.py */

#ifndef BNNF_FORMAT_H
#define BNNF_FORMAT_H

#include <stddef.h>
#include <stdint.h>

#define BNNF_MAGIC "\142\156\156\146\015\012\032\012"
#define BNNF_MAGIC_BYTES 8
#define BNNF_VERSION 3u
#define BNNF_ALIGN 64u
#define BNNF_CHECKED_FROM 16u
#define BNNF_NONE 0xFFFFFFFFu
/* tensors, and ops; there is one of each at least */
#define BNNF_MAX_RECORDS UINT64_C(65536)
/* bytes of names, of class names, of metadata */
#define BNNF_MAX_TEXT UINT64_C(4194304)
/* bytes of one name, class name or key of the metadata, without its line feed */
#define BNNF_MAX_LINE UINT64_C(1024)
/* keys of the metadata */
#define BNNF_MAX_KEYS UINT64_C(1024)
/* values along one dimension; each field of a window */
#define BNNF_MAX_SIDE UINT64_C(1048576)
/* values of the image and of an activation, bits counted one by one */
#define BNNF_MAX_VALUES UINT64_C(134217728)
/* of the arena, and of the input of an op with a window as stored in its dtype (bits in whole words), with the
   padding on both sides and, where ceil is 1, one stride more along each axis */
#define BNNF_MAX_BYTES UINT64_C(1073741824)
/* positions of one window */
#define BNNF_MAX_TAPS UINT64_C(262144)
/* products in a sum of binary_conv2d: float32 holds all whole numbers up to here (a conv2d with weights of bits is
   not limited) */
#define BNNF_MAX_SUM UINT64_C(16777216)
/* positions along an axis at which a window of pixel_conv2d has its first or its last tap outside */
#define BNNF_MAX_BORDER UINT64_C(65536)
/* values and products of one image over all ops, about 90 times a ResNet-152: see Limits */
#define BNNF_MAX_WORK UINT64_C(1099511627776)
/* results that a sum counts for at least in that: each step costs an engine something */
#define BNNF_LEAST_WORK UINT64_C(1024)

enum bnnf_dtype {
    /* IEEE single precision */
    BNNF_DTYPE_F32 = 0,
    /* signs: 1 is negative; value c of the last dimension is bit c % 64 of its word c // 64 */
    BNNF_DTYPE_BITS = 1,
    /* two's complement */
    BNNF_DTYPE_I8 = 2,
    /* a pixel */
    BNNF_DTYPE_U8 = 3,
    /* two's complement */
    BNNF_DTYPE_I32 = 4,
};

enum bnnf_place {
    /* in this file */
    BNNF_PLACE_CONSTANT = 0,
    /* in the arena while the engine runs */
    BNNF_PLACE_ACTIVATION = 1,
    /* the caller's pixels, [height, width, channels] */
    BNNF_PLACE_IMAGE = 2,
};

#define BNNF_OP_COUNT 20
enum bnnf_op {
    /* the epilogue on its own: v is the input, bits as +1 and -1, pixels as 0 to 255 */
    /* input: f32 or bits or u8; may have: other, factor, scale, bias, slope, low, high, scale_after, bias_after,
       threshold, flip, real, bits */
    BNNF_OP_POINTWISE = 1,
    /* v is the exact sum of products of signs; taps on padding count pad_value */
    /* input: bits; weights: bits; needs: weights; may have: other, factor, scale, bias, slope, low, high,
       scale_after, bias_after, threshold, flip, real, bits; window */
    BNNF_OP_BINARY_CONV2D = 2,
    /* v is the exact sum of pixels times weights over the taps inside the image; the epilogue's bias depends on
       which taps are inside, so that padding is zero after normalisation */
    /* input: u8; weights: i8; needs: weights, scale, bias; may have: other, factor, slope, low, high, scale_after,
       bias_after, threshold, flip, real, bits; window */
    BNNF_OP_PIXEL_CONV2D = 3,
    /* v is the float sum of inputs times weights, row by row, column by column, channel by channel, each product and
       each sum rounded; taps on padding count pad_value */
    /* input: f32; weights: f32 or i8 or bits; needs: weights; may have: other, factor, scale, bias, slope, low,
       high, scale_after, bias_after, threshold, flip, real, bits; window */
    BNNF_OP_CONV2D = 4,
    /* largest value of the window inside the image */
    /* input: f32 or bits; may have: real, bits; window */
    BNNF_OP_MAX_POOL2D = 5,
    /* sum of the window's values inside the image, row by row, then column by column, divided by their number */
    /* input: f32; needs: real; window */
    BNNF_OP_AVG_POOL2D = 6,
    /* the channels of input, then those of other */
    /* input: f32 or bits; needs: other; may have: real, bits */
    BNNF_OP_CONCAT = 7,
    /* e^(v - max v) over its sum, along the channels */
    /* input: f32; needs: real */
    BNNF_OP_SOFTMAX = 8,
    /* v is the input less the mean of its group of channels over all positions, divided by their deviation */
    /* input: f32; weights: f32; needs: weights; may have: other, factor, scale, bias, slope, low, high, scale_after,
       bias_after, threshold, flip, real, bits */
    BNNF_OP_GROUP_NORM = 9,
    /* v is the input divided by the root mean square of its group of channels over all positions */
    /* input: f32; weights: f32; needs: weights; may have: other, factor, scale, bias, slope, low, high, scale_after,
       bias_after, threshold, flip, real, bits */
    BNNF_OP_RMS_NORM = 10,
    /* v is the input less the mean of its position over all channels, divided by their deviation; uncentred: with a
       mean of 0 */
    /* input: f32; weights: f32; needs: weights; may have: other, factor, scale, bias, slope, low, high, scale_after,
       bias_after, threshold, flip, real, bits; mode: 0 centred, 1 uncentred */
    BNNF_OP_CHANNEL_NORM = 11,
    /* v is a function of the input */
    /* input: f32; may have: other, factor, scale, bias, slope, low, high, scale_after, bias_after, threshold, flip,
       real, bits; mode: 0 sigmoid, 1 tanh, 2 gelu, 3 gelu_tanh, 4 silu, 5 elu, 6 exp, 7 sqrt, 8 reciprocal */
    BNNF_OP_FUNCTION = 12,
    /* v is the float sum of inputs times weights, where output row r takes input row q by tap i if q stride_h -
       padding_h + i dilation_h = r */
    /* input: f32; weights: f32; needs: weights; may have: other, factor, scale, bias, slope, low, high, scale_after,
       bias_after, threshold, flip, real, bits; kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
       dilation_h, dilation_w, groups, size_h, size_w */
    BNNF_OP_CONV_TRANSPOSE2D = 13,
    /* channel o is the input's channel weights[o]; of floats +0 where that is -1 */
    /* input: f32 or bits; weights: i32; needs: weights; may have: real, bits */
    BNNF_OP_TAKE = 14,
    /* row r is the input's row padding_h + r stride_h, likewise columns */
    /* input: f32 or bits; may have: real, bits; stride_h, stride_w, padding_h, padding_w, size_h, size_w */
    BNNF_OP_CROP = 15,
    /* rows and columns around the input */
    /* input: f32 or bits; may have: real, bits; mode: 0 constant, 1 reflect, 2 replicate, 3 circular; padding_h,
       padding_w, after_h, after_w, pad_value */
    BNNF_OP_PAD = 16,
    /* the map in another size */
    /* input: f32; needs: real; mode: 0 nearest, 1 bilinear, 2 bilinear_corners; size_h, size_w */
    BNNF_OP_RESIZE = 17,
    /* channels to the stride_h x stride_w places of a block of positions, or back */
    /* input: f32; needs: real; mode: 0 shuffle, 1 unshuffle; stride_h, stride_w */
    BNNF_OP_PIXEL_SHUFFLE = 18,
    /* over the channels of each position: one result */
    /* input: f32; needs: real; mode: 0 mean, 1 sum, 2 max */
    BNNF_OP_REDUCE_CHANNELS = 19,
    /* product of the signs of input and other */
    /* input: bits; needs: other, bits */
    BNNF_OP_XOR = 20,
    BNNF_OP_END
};
_Static_assert(BNNF_OP_END - BNNF_OP_POINTWISE == BNNF_OP_COUNT, "the codes of the ops follow each other");

struct bnnf_header_record {
    char magic[8];           /*   0: "bnnf", carriage return, line feed, 0x1a, line feed */
    uint32_t version;        /*   8: of the format; a reader refuses any other */
    uint32_t checksum;       /*  12: CRC-32 (IEEE 802.3, as zlib) of every byte from offset 16 to the end */
    uint64_t file_bytes;     /*  16: size of the whole file */
    uint64_t arena_bytes;    /*  24: memory that holds all activations of one image */
    uint32_t tensor_count;   /*  32: records in the tensor table */
    uint32_t op_count;       /*  36: records in the op table */
    uint32_t name_bytes;     /*  40: size of the names: one UTF-8 line per tensor */
    uint32_t class_bytes;    /*  44: size of the class names: one UTF-8 line per class */
    uint32_t metadata_bytes; /*  48: size of the metadata: UTF-8 lines, a key and its value in turn */
    uint32_t input;          /*  52: tensor that takes the image */
    uint32_t output;         /*  56: tensor that holds the result */
    uint32_t zero;           /*  60: 0 */
    char producer[32];       /*  64: what wrote the file: 0 to 32 bytes of 0x20 to 0x7E, then zeros */
    char rest[32];           /*  96: zeros */
};
_Static_assert(sizeof(struct bnnf_header_record) == 128, "no gaps");
_Static_assert(offsetof(struct bnnf_header_record, rest) == 96, "no gaps");

struct bnnf_tensor_record {
    uint64_t offset;   /*   0: constant: from the start of the file; activation: of the arena; image: 0 */
    uint64_t bytes;    /*   8: size; follows from dtype and shape */
    uint32_t shape[4]; /*  16: sizes, each 1 or more, the last varies fastest; 1 beyond the rank */
    uint8_t dtype;     /*  32: code of its dtype */
    uint8_t place;     /*  33: code of its place */
    uint8_t rank;      /*  34: number of sizes, 1 to 4 */
    uint8_t zero;      /*  35: 0 */
    uint32_t zeros;    /*  36: 0 */
};
_Static_assert(sizeof(struct bnnf_tensor_record) == 40, "no gaps");
_Static_assert(offsetof(struct bnnf_tensor_record, zeros) == 36, "no gaps");

struct bnnf_op_record {
    uint32_t code;        /*   0: which op */
    uint32_t input;       /*   4: activation that it reads, or the image */
    uint32_t other;       /*   8: second activation: what the epilogue adds, or the second part of a concat */
    uint32_t factor;      /*  12: activation that the epilogue multiplies by */
    uint32_t real;        /*  16: activation it writes in float32 */
    uint32_t bits;        /*  20: activation it writes in bits */
    uint32_t weights;     /*  24: constant [outputs, kernel_h, kernel_w, channels / groups]; of a norm [groups]: its eps; of take i32 [outputs] */
    uint32_t scale;       /*  28: constant f32 [channels]: factor of the epilogue */
    uint32_t bias;        /*  32: constant f32 [channels]; of pixel_conv2d, and where wanted of binary_conv2d, [row, column classes, channels] */
    uint32_t slope;       /*  36: constant f32 [channels]: factor of negative values */
    uint32_t low;         /*  40: constant f32 [channels]: smallest value */
    uint32_t high;        /*  44: constant f32 [channels]: largest value */
    uint32_t scale_after; /*  48: constant f32 [channels]: factor after the activation */
    uint32_t bias_after;  /*  52: constant f32 [channels]: added after the activation */
    uint32_t threshold;   /*  56: constant [channels]: f32, of the value; or i32, of the sum of signs */
    uint32_t flip;        /*  60: constant bits [channels]: where the bit is inverted */
    uint32_t kernel_h;    /*  64: rows of the window */
    uint32_t kernel_w;    /*  68: columns of the window */
    uint32_t stride_h;    /*  72: rows from one position to the next */
    uint32_t stride_w;    /*  76: columns from one position to the next */
    uint32_t padding_h;   /*  80: rows added above */
    uint32_t padding_w;   /*  84: columns added on the left */
    uint32_t after_h;     /*  88: rows added below */
    uint32_t after_w;     /*  92: columns added on the right */
    uint32_t dilation_h;  /*  96: rows from one tap to the next */
    uint32_t dilation_w;  /* 100: columns from one tap to the next */
    uint32_t groups;      /* 104: channels are split into so many independent convolutions */
    int32_t pad_value;    /* 108: what padding carries: 0, 1 or -1 */
    uint32_t ceil;        /* 112: 1: windows of a pooling may hang over the far edge */
    uint32_t other_last;  /* 116: 1: the epilogue adds `other` after the activation */
    uint32_t mode;        /* 120: which of its kind, for an op that has several */
    uint32_t size_h;      /* 124: rows of the result, for an op that does not follow them from its window */
    uint32_t size_w;      /* 128: columns of the result, likewise */
    uint32_t rest[7];     /* 132: zeros */
};
_Static_assert(sizeof(struct bnnf_op_record) == 160, "no gaps");
_Static_assert(offsetof(struct bnnf_op_record, rest) == 132, "no gaps");

#endif
